"""A command whose address space is nearly used up computes with fewer threads, or ends in one line: never a signal."""

import json
import os
import resource
import subprocess
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path

import pytest

from tests.checkpoints import make
from tests.commands import ROOT, invoke

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="/proc tells how much is in use")

ROOMS = (0, 32, 96, 250, 450, 470, 640, 1200)  # MiB beyond what is in use once everything is imported
THREADS = 48  # whose stacks alone are some 400 MiB


def _try(words: list[str], room: int, said: Path) -> tuple[int, str]:
    """``coldstream WORDS`` in a fork of this process; its exit code or negative signal, and what it said."""
    child = os.fork()
    if not child:
        code = 70
        try:
            out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            sys.argv = ["coldstream", *words]
            from cli.main import main

            most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + (room << 20)
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:  # noqa: BLE001  a child must never come back to its parent's code
            traceback.print_exc()
        finally:
            os._exit(code)
    end = time.monotonic() + 120
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), said.read_text(errors="replace")
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return -99, "it did not end"


def _trials() -> None:
    """Print, for each room, how the words in argv ended."""
    for name in ("cli.commands.generate", "cli.commands.quantize", "offload.run.collect", "quant.convert.convert"):
        import_module(name)  # what a command imports is no part of its room
    for room in ROOMS:
        print(json.dumps([room, *_try(json.loads(sys.argv[1]), room, Path(sys.argv[2]))]))


def _ended(words: list[str], folder: Path) -> dict[int, tuple[int, str]]:
    command = [sys.executable, "-c", "from tests.cli.test_address_space import _trials; _trials()"]
    done = subprocess.run(
        [*command, json.dumps(words), str(folder / "said")], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {room: (code, said) for room, code, said in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    source = make("llama4_text", folder / "source", num_hidden_layers=2, num_local_experts=2)
    done = invoke("quantize", source, folder / "made", "--experts", "int4", "--rounding", "rtn", "-q")
    assert done.returncode == 0, done.stderr
    return folder


def test_a_run_ends_with_its_text_or_in_one_line(model: Path, tmp_path: Path) -> None:
    words = [
        "generate",
        str(model / "made"),
        "prompt",
        "-n",
        "3",
        "--ram",
        "1GiB",
        "--context",
        "64",
        "--device",
        "cpu",
    ]
    ended = _ended([*words, "--threads", str(THREADS)], tmp_path)
    for room, (code, said) in ended.items():
        errors = [line for line in said.splitlines() if line.startswith("coldstream: error:")]
        assert (code, len(errors)) in ((0, 0), (1, 1)) and "Traceback" not in said, (room, code, said[-2000:])
    assert ended[0][0] == 1


def test_a_conversion_ends_whole_or_in_one_line(model: Path, tmp_path: Path) -> None:
    words = ["quantize", str(model / "source"), str(tmp_path / "out"), "--experts", "int4", "--resume"]
    ended = _ended(words, tmp_path)
    for room, (code, said) in ended.items():
        errors = [line for line in said.splitlines() if line.startswith("coldstream: error:")]
        assert (code, len(errors)) in ((0, 0), (1, 1)) and "Traceback" not in said, (room, code, said[-2000:])
    assert ended[0][0] == 1 and ended[ROOMS[-1]][0] == 0
