"""How the native kernels are found, chosen and shared: no silent fallback, any caller, any process."""

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from quant.errors import MachineError
from quant.kernels import library, native
from quant.kernels.native import Weight
from quant.pack import quantize_absmax
from quant.scheme import Scheme

ROOT = Path(__file__).parents[3]


def weight(seed: int) -> Weight:
    stored = quantize_absmax(torch.randn(200, 256, generator=torch.Generator().manual_seed(seed)), Scheme("int4", 64))
    return Weight.from_tensors("int4", stored.packed, stored.scale)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The code in a process of its own, in the repository's root."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_missing_kernels_say_how_to_build_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    with pytest.raises(MachineError, match=r"no _native\*\.so in .*pip install"):
        library.library.__wrapped__()


def test_kernels_that_cannot_be_loaded_name_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "_native.abi3.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    with pytest.raises(MachineError, match=r"_native\.abi3\.so cannot be loaded"):
        library.library.__wrapped__()


def test_kernels_built_from_other_sources_are_refused_before_they_are_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = Path(library.__file__).parent
    shutil.copytree(kernels / "cpp", tmp_path / "cpp")
    (tmp_path / "_native.abi3.so").symlink_to(next(kernels.glob("_native*.so")))
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    library.library.__wrapped__()
    header = tmp_path / "cpp" / "moe.h"
    header.write_text(header.read_text() + "// another field\n")
    with pytest.raises(MachineError, match=r"other sources than this version's \(.*build_ext --inplace"):
        library.library.__wrapped__()


def test_kernels_from_before_they_said_what_they_were_built_from_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("no C compiler")
    built = str(tmp_path / "_native.abi3.so")
    source = tmp_path / "nothing.c"
    source.touch()
    subprocess.run([compiler, "-shared", "-fPIC", "-o", built, str(source)], check=True)
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    with pytest.raises(MachineError, match=r"built from other sources .*\(unknown, expected a later version\)"):
        library.library.__wrapped__()


def test_the_environment_forces_a_lower_instruction_set() -> None:
    code = "from quant.kernels import native; print(native.isa())"
    assert python(code, COLDSTREAM_ISA="portable").stdout.strip() == "portable"
    refused = python(code, COLDSTREAM_ISA="sse9")
    assert refused.returncode != 0
    assert "MachineError: instruction set 'sse9' cannot be used here" in refused.stderr


def test_instruction_sets_are_listed_best_first_and_end_with_the_portable_one() -> None:
    assert native.isas()[-1] == "portable"
    assert native.isa() == native.isas()[0]


def test_a_forked_child_starts_threads_of_its_own() -> None:
    code = """
import os, torch
from quant.kernels import native
from quant.kernels.native import Weight
native.set_threads(3)
w = Weight.from_tensors("f32", torch.randn(400, 64))
x = torch.randn(2, 64)
y = native.linear(x, w)
if os.fork() == 0:
    os._exit(0 if torch.equal(native.linear(x, w), y) and native.threads() == 3 else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_calls_from_many_python_threads_do_not_mix() -> None:
    weights = [weight(seed) for seed in range(8)]
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(9))
    expected = [native.linear(x, w) for w in weights]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            found = list(pool.map(lambda w: native.linear(x, w), weights))
            assert all(map(torch.equal, found, expected))


def test_thread_counts_that_make_no_sense_are_refused() -> None:
    for count in (0, -1, 5000):
        with pytest.raises(MachineError, match="expected 1 to 1024"):
            native.set_threads(count)


def test_read_bandwidth_is_a_plausible_rate() -> None:
    assert 0.1 < native.read_bandwidth(1 << 24, 0.02) < 5000


def test_memory_that_is_there_is_read_as_fast_as_new_memory() -> None:
    there = torch.zeros(1 << 24, dtype=torch.uint8)
    assert 0.1 < native.read_rate(there, 0.02) < 5000
    assert native.read_rate(there[:1000]) == 0


@pytest.mark.parametrize("isa", native.isas())
def test_no_product_is_faster_than_the_dot_products_it_is_made_of(isa: str) -> None:
    n, k, tokens = 512, 2048, 256
    weight = Weight.from_tensors(
        "int8", torch.randint(-9, 9, (n, k // 4), dtype=torch.int32), torch.ones(n, 16).bfloat16()
    )
    x, out, took = torch.randn(tokens, k), torch.empty(tokens, n), []
    native.set_isa(isa)
    try:
        for _ in range(5):
            start = time.perf_counter()
            native.linear(x, weight, out=out)
            took.append(time.perf_counter() - start)
        best = max(native.dot_rate(0.05) for _ in range(3))
    finally:
        native.set_isa("")
    assert n * k * tokens / min(took) / 1e9 < best < 1e5


_FEW_THREADS = """
import resource, torch
from pathlib import Path
from quant.kernels import native
from quant.kernels.native import Weight
native.threads()
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20),) * 2)
native.set_threads(64)
product = native.linear(torch.ones(2, 128), Weight.from_tensors("f32", torch.ones(8, 128)))
print(native.threads(), bool((product == 128).all()), native.thread_note())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a limit on address space")
def test_where_no_more_threads_start_those_that_did_compute_and_it_is_said() -> None:
    done = python(_FEW_THREADS)
    assert done.returncode == 0, done.stderr
    count, right, note = done.stdout.split(" ", 2)
    assert 1 <= int(count) < 64 and right == "True"
    assert note.startswith(f"{count} of 64 threads compute")
