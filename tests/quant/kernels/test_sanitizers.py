"""The native code reads and writes no byte too far, does nothing undefined, and has no unordered accesses.

Its sources are built with each sanitizer and run by a driver that gives every buffer exactly its size.
"""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[3] / "quant" / "kernels" / "cpp"
DRIVER = Path(__file__).with_name("driver.cpp")
COMPILER = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")


def build(sanitizer: str, folder: Path) -> Path:
    """The driver with the kernels' sources, or a skip where the compiler has no such sanitizer."""
    assert COMPILER is not None
    # Without optimization: with it, compiling takes four times as long, and the checks are the same.
    flags = ["-std=c++17", "-O0", "-g1", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi", "-pthread"]
    flags += [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", f"-I{KERNELS}"]
    trial = folder / "trial.cpp"
    trial.write_text("int main() {}\n")
    if subprocess.run([COMPILER, *flags, str(trial), "-o", str(folder / "trial")], capture_output=True).returncode:
        pytest.skip(f"{COMPILER} cannot link -fsanitize={sanitizer}")
    sources = [path for path in sorted(KERNELS.glob("*.cpp")) if path.name != "module.cpp"] + [DRIVER]
    objects = [folder / f"{path.stem}.o" for path in sources]

    def compile_one(source: Path, to: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([COMPILER, *flags, "-c", str(source), "-o", str(to)], capture_output=True, text=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in pool.map(compile_one, sources, objects):
            assert done.returncode == 0, done.stderr
    binary = folder / "driver"
    linked = subprocess.run([COMPILER, *flags, *map(str, objects), "-o", str(binary)], capture_output=True, text=True)
    assert linked.returncode == 0, linked.stderr
    return binary


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_every_kernel_runs_clean(sanitizer: str, tmp_path: Path) -> None:
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    binary = build(sanitizer, tmp_path)
    run = subprocess.run([str(binary)], capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    assert "all kernels ran" in run.stdout
