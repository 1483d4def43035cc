"""Try an installed wheel: `make wheel-smoke` runs this with the clean environment's Python, elsewhere.

Prints one line per fact checked; the first that does not hold ends it with an AssertionError.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from importlib import import_module, metadata
from importlib.resources import files
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PREFIX = Path(sys.prefix).resolve()
COMMAND = PREFIX / "bin" / "coldstream"


def say(fact: str) -> None:
    print(f"wheel-smoke: {fact}", flush=True)


def run(*arguments: str, folder: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [str(COMMAND), *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"coldstream {' '.join(arguments)} exited {done.returncode}:\n{done.stderr}"
    return done


def check_contents() -> None:
    for name in ("quant", "offload", "cli", "recipes"):
        path = Path(import_module(name).__file__ or "").resolve()
        assert PREFIX in path.parents, f"{name} comes from {path}, not from the wheel in {PREFIX}"
    say(f"coldstream {metadata.version('coldstream')}: quant, offload, cli, recipes come from the wheel")

    native = sorted((Path(str(files("quant"))) / "kernels").glob("*.so"))
    assert native, "no native module in quant/kernels"
    import_module("quant.kernels._native")
    say(f"{native[0].name} is built in and loads")

    for here in sorted(
        path for path in (ROOT / "recipes").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ):
        name = here.relative_to(ROOT / "recipes")
        there = Path(str(files("recipes"))) / name
        assert there.is_file(), f"recipes/{name} is not in the wheel"
        assert there.read_bytes() == here.read_bytes(), f"recipes/{name} in the wheel differs"
    say("every file of recipes/, the demo model among them, is in the wheel byte for byte")

    assert files("cli.schemas").joinpath("plan.json").is_file(), "the schemas of --json are not in the wheel"
    stray = [str(f) for f in metadata.files("coldstream") or [] if str(f).endswith((".cpp", ".h", ".inl"))]
    assert not stray, f"sources that nobody runs are in the wheel: {stray}"
    assert not any(str(f).startswith("tests") for f in metadata.files("coldstream") or [])


def check_pages() -> None:
    for kind in ("run", "evaluation"):
        [renderer] = metadata.entry_points(group="coldstream.pages", name=kind)
        assert callable(renderer.load())
    say("reports find what makes pages of them")


def check_commands() -> None:
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        assert "quantize" in run("--help", folder=folder).stdout
        say(f"coldstream --help answered in {time.perf_counter() - started:.2f} s")

        started = time.perf_counter()
        done = run("demo", "--json", folder=folder)
        report = json.loads(done.stdout.splitlines()[-1])
        assert isinstance(report, dict) and report, f"no JSON object on the last line of stdout: {done.stdout[-300:]}"
        say(f"coldstream demo --json ran in {time.perf_counter() - started:.1f} s with {', '.join(report)}")


if __name__ == "__main__":
    check_contents()
    check_pages()
    check_commands()
    say("all well")
