"""What the GPU bench does before it measures: see what is there, build what is not, run the tests."""

import ctypes
import importlib.metadata
import importlib.util
import mmap
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
KERNEL_TESTS = Path("tests/quant/kernels/cuda")
_NEEDED = ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy", "psutil", "rich", "pytest")
_OPTIONAL = ("bitsandbytes", "compressed_tensors", "accelerate")
_NO_TESTS = 5  # pytest's exit code where all were deselected
_BUILD_S = 300
_STUCK_S = 100  # a test that takes longer says where it is


def card_name() -> str | None:
    """The CUDA device that torch would use, asked in another process: this one stays without a context."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=False)
    said = done.stdout.strip().splitlines()
    return said[-1] if done.returncode == 0 and said else None


def prepared(root: Path = ROOT) -> dict[str, Any]:
    """Which packages are missing, and the native kernels, built in place where they are not there."""
    absent = {
        kind: [name for name in names if importlib.util.find_spec(name) is None]
        for kind, names in (("missing", _NEEDED), ("missing_optional", _OPTIONAL))
    }
    found: dict[str, Any] = {**absent, "native": "was there"}
    if absent["missing"]:
        found["failed"] = f"not installed: {', '.join(absent['missing'])}"
    elif not compiles():
        found["failed"] = "no C compiler, or no Python.h for it: Triton builds its launcher with them"
    if list((root / "quant/kernels").glob("_native*.so")):
        return found
    started, found["native"] = time.monotonic(), "missing"
    try:
        done = subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_BUILD_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {**found, "failed": f"native kernels: not built after {_BUILD_S} s"}
    if done.returncode:
        why = "native kernels: not built; bring _native.abi3.so from a like machine into quant/kernels"
        return {**found, "failed": why, "said": done.stdout.splitlines()[-12:]}
    return {**found, "native": f"built in {time.monotonic() - started:.0f} s"}


def grown(wanted: int, *, block: int = 4 * 2**30, patience: float = 3.0) -> dict[str, int]:
    """Bytes of RAM before and after touching ``wanted`` of them, block by block, each once there is room for
    it: a virtual machine may begin with little memory and be given more as it is used, and plans count with
    what there is."""
    from offload.hardware.system import memory

    before, held = memory()[0], []
    for _ in range(-(-wanted // block)):
        deadline = time.monotonic() + patience
        while memory()[1] < 2 * block and time.monotonic() < deadline:
            time.sleep(0.1)
        if memory()[1] < 2 * block:
            break
        held.append(mmap.mmap(-1, block, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        _touch(held[-1])
    touched = block * len(held)
    for part in held:
        part.close()
    return {"ram_before": before, "touched": touched, "ram_after": memory()[0]}


def _touch(part: mmap.mmap, threads: int = 8) -> None:
    """Write to every page."""
    first = ctypes.c_char.from_buffer(part)
    start, each = ctypes.addressof(first), len(part) // threads
    with ThreadPoolExecutor(threads) as pool:  # memset runs outside the interpreter's lock
        list(pool.map(lambda index: ctypes.memset(start + index * each, 1, each), range(threads)))


def compiles() -> bool:
    """Whether a C compiler and Python's headers are there."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return bool(compiler) and (Path(sysconfig.get_path("include")) / "Python.h").is_file()


def versions() -> dict[str, str | None]:
    """Of what the GPU path rests on; None for what is not installed."""
    import torch

    found: dict[str, str | None] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    for name in ("triton", "transformers", "bitsandbytes", "compressed-tensors", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return {**found, "python": sys.version.split()[0]}


def gpu_test_files(root: Path = ROOT) -> tuple[list[Path], list[Path]]:
    """(files of the kernels' tests, the other files with tests marked ``gpu``). No others are collected: they
    import packages that only tests without a card need."""
    kernels = [
        file for file in sorted((root / KERNEL_TESTS).glob("test_*.py")) if "device: torch.device" in file.read_text()
    ]
    others = [
        file
        for file in sorted((root / "tests").rglob("test_*.py"))
        if "pytest.mark.gpu" in file.read_text() and file not in kernels
    ]
    return kernels, others


def gpu_tests(root: Path = ROOT) -> dict[str, Any]:
    """The tests marked ``gpu``: closing lines and the names of those that failed.

    Kernels' files run at once, since compiling takes most of their time; then the others one by one, since
    they watch the card's memory.
    """
    kernels, others = gpu_test_files(root)
    runs = [_pytest(root, [file]) for file in kernels]
    closings, failures, codes, passed = [], [], [], True
    for files in [*([file] for file in kernels), others]:
        run = runs.pop(0) if runs else _pytest(root, files)
        lines: list[str] = []
        assert run.stdout is not None
        for line in run.stdout:  # to the log as it comes: a run that is cut off shows how far it got
            print(line, end="", flush=True)
            lines.append(line.rstrip())
        code = run.wait()
        closings.append(f"{', '.join(file.name for file in files)}: {lines[-1].strip('= ') if lines else ''}")
        failures += [line.split(" ", 1)[1] for line in lines if line.startswith(("FAILED ", "ERROR "))]
        codes.append(code)
        passed &= code == _NO_TESTS or (code == 0 and " passed" in lines[-1])  # skipped is not passed
    return {"closing": "; ".join(closings), "passed": passed, "failures": failures, "exit_codes": codes}


def _pytest(root: Path, files: Sequence[Path]) -> subprocess.Popen[str]:
    # Warnings are errors where versions are pinned; here the card is on trial, with any versions.
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", "-W", "default"]
    command += ["-o", f"faulthandler_timeout={_STUCK_S}"]
    return subprocess.Popen(
        [*command, *map(str, files)], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
