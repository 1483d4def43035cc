"""A conversion that is killed, or fails, at each of its system calls on the destination, and is then resumed.

    python -m tests.faults.trials SOURCE FOLDER --how kill --every 1 -- --experts int4

Each trial runs `coldstream quantize SOURCE FOLDER/out …` in a fork of this process, with the N-th counted call
disturbed as ``--how`` says, then the same with ``--resume``, twice, and compares every file with those of a run
that was left alone. What a run left is resumed, or found complete, once: a later trial that leaves the same names and
bytes is not tried again. ``--on source`` counts calls on the source instead. ``{folder}`` in an option is the folder
that holds the destination: what is written there, as by ``--save-imatrix {folder}/matrix.safetensors``, is disturbed
and compared, too. Prints one JSON document: how many calls there were, how many trials were made, how many different
things they left, and those that did not end the same.
"""

import argparse
import ctypes
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

_OFF, _COUNT, _SIGNAL, _ONCE, _EVER = range(5)
# How a call is disturbed: by a signal, by an error once, or by one that stays (a full disk, for calls that grow).
HOWS: dict[str, tuple[int, int, bool]] = {
    "kill": (_SIGNAL, signal.SIGKILL, False),
    "term": (_SIGNAL, signal.SIGTERM, False),
    "int": (_SIGNAL, signal.SIGINT, False),
    "eio": (_ONCE, errno.EIO, False),
    "eio-stays": (_EVER, errno.EIO, False),
    "full": (_EVER, errno.ENOSPC, True),
}
_SECONDS = 600  # a machine may have other work


def build(folder: Path) -> Path:
    """The library to be preloaded. Raises CalledProcessError without a C compiler."""
    library = folder / "interpose.so"
    source = Path(__file__).with_name("interpose.c")
    compiler = os.environ.get("CC", "cc")
    command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return library


def run(source: Path, folder: Path, options: list[str], *more: str) -> dict[str, Any]:
    """``main`` in a process of its own, with the library preloaded; what it printed."""
    with tempfile.TemporaryDirectory() as built:
        library = build(Path(built))
        command = [sys.executable, "-m", "tests.faults.trials", str(source), str(folder), *more, "--", *options]
        environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
        root = Path(__file__).resolve().parents[2]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment, cwd=root)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def contents(folder: Path) -> dict[str, str]:
    """A hash of each file under ``folder``."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _state(folder: Path) -> frozenset[tuple[str, str]]:
    """All that a resuming run can see of ``folder``: names, modes and bytes."""
    found = contents(folder)
    paths = {str(path.relative_to(folder)): oct(path.lstat().st_mode) for path in folder.rglob("*")}
    return frozenset((name, mode + found.get(name, "")) for name, mode in paths.items())


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code or the negative signal, what it said, the calls that it made and the modules that
    it had; those of the last two that a signal cut off are none."""

    code: int
    said: str
    calls: int = 0
    modules: tuple[str, ...] = ()

    @property
    def is_clean(self) -> bool:
        """Done, killed, interrupted, or failed in one line."""
        lines = [line for line in self.said.splitlines() if line.startswith("coldstream: error:")]
        failed = self.code == 1 and len(lines) == 1 and "Traceback" not in self.said
        return self.code in (0, 130, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT) or failed


class Trials:
    """Runs of one command, each in a fork of this process, which has everything imported."""

    def __init__(self, source: Path, folder: Path, options: list[str], on: str) -> None:
        self.source, self.folder, self.options, self.on = source, folder, options, on
        self.library = ctypes.CDLL(os.environ["LD_PRELOAD"])
        self.library.fault_calls.restype = ctypes.c_long

    def go(self, destination: Path, *more: str, how: tuple[int, int, bool] = (_OFF, 0, False), at: int = 0) -> Ended:
        """One run."""
        said = self.folder / "said"
        counted = self.folder / "calls"
        child = os.fork()
        if not child:
            self._child(destination, more, how, at, said, counted)
        deadline = time.monotonic() + _SECONDS
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return Ended(-99, f"did not end in {_SECONDS} s")
            time.sleep(0.002)
        calls, modules = json.loads(counted.read_text()) if counted.exists() else (0, ())
        counted.unlink(missing_ok=True)
        return Ended(os.waitstatus_to_exitcode(status), said.read_text(), calls, tuple(modules))

    def _child(
        self, destination: Path, more: tuple[str, ...], how: tuple[int, int, bool], at: int, said: Path, counted: Path
    ) -> None:
        out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        options = [option.replace("{folder}", str(destination.parent)) for option in self.options]
        sys.argv = ["coldstream", "quantize", str(self.source), str(destination), *options, *more]
        from cli.main import main

        under = str(self.source if self.on == "source" else destination.parent) + "/"
        mode, number, growing = how
        code = 70
        try:
            self.library.fault_arm(under.encode(), mode, ctypes.c_long(at), number, int(growing))
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:  # noqa: BLE001 - a child must never come back to its parent's code
            import traceback

            traceback.print_exc()
        finally:
            calls = self.library.fault_calls()
            self.library.fault_arm(under.encode(), _OFF, ctypes.c_long(0), 0, 0)
            counted.write_text(json.dumps([calls, list(sys.modules)]))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


@contextmanager
def _fresh(folder: Path) -> Iterator[Path]:
    """A new folder for a trial's destination, removed afterwards."""
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _prepare() -> None:
    """Every part is made safe at once, so that a run that dies has something to go on from."""
    from quant.convert.convert import convert

    assert convert.__kwdefaults__ is not None
    convert.__kwdefaults__["sync_bytes"] = 1


def _import(modules: tuple[str, ...]) -> None:
    """Import what a run imported, and what transformers compiles on first use, so that a fork has it."""
    for name in modules:
        with suppress(Exception):  # one that is no module's name, or stands on one that is not there
            import_module(name)
    if (mapping := sys.modules.get("transformers.conversion_mapping")) is not None:
        mapping.get_checkpoint_conversion_mapping("")


def main() -> None:
    """Make the trials that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--how", choices=HOWS, nargs="+", default=["kill"], help="Several take turns.")
    parser.add_argument("--each", action="store_true", help="They do not: each call is disturbed in each of the ways.")
    parser.add_argument("--on", choices=("destination", "source"), default="destination")
    parser.add_argument("--every", type=int, default=1, help="Every so many calls.")
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--existing", action="store_true", help="The destination is an empty directory.")
    parser.add_argument("--in-turn", action="store_true", help="It is, every other time.")
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    asked, options = parser.parse_args(words[:split]), words[split + 1 :]
    if "LD_PRELOAD" not in os.environ:
        print(json.dumps(run(asked.source, asked.folder, options, *words[2:split])))
        return
    _prepare()
    trials = Trials(asked.source.resolve(), asked.folder.resolve(), options, asked.on)
    asked.folder.mkdir(parents=True, exist_ok=True)
    with _fresh(trials.folder / "whole") as folder:
        whole = trials.go(folder / "out", how=(_COUNT, 0, False))
        expected = contents(folder)
    _import(whole.modules)
    failures, made, codes = [], 0, dict[int, int]()
    ended_well: set[frozenset[tuple[str, str]]] = set()  # what a first run left that was resumed
    complete: set[frozenset[tuple[str, str]]] = set()  # what a resumed run left that was found complete
    at_each = range(asked.first, whole.calls + 1, asked.every)
    rounds = len(asked.how) if asked.each else 1
    for turn, at in enumerate(at for at in at_each for _ in range(rounds)):
        if turn % 50 == 49:
            print(f"call {at} of {whole.calls}", file=sys.stderr, flush=True)
        with _fresh(trials.folder / "trial") as folder:
            if asked.existing or (asked.in_turn and turn // len(asked.how) % 2):
                (folder / "out").mkdir()
            first = trials.go(folder / "out", how=HOWS[asked.how[turn % len(asked.how)]], at=at)
            made += 1
            codes[first.code] = codes.get(first.code, 0) + 1
            left_behind = _state(folder)
            if first.is_clean and left_behind in ended_well:
                continue
            second = third = trials.go(folder / "out", "--resume")
            found, resumed = contents(folder), _state(folder)
            same = found == expected
            if resumed not in complete:
                third = trials.go(folder / "out", "--resume")
                if third.code == 0 and "already complete" in third.said and _state(folder) == resumed:
                    complete.add(resumed)
            if first.is_clean and second.code == 0 and same and resumed in complete:
                ended_well.add(left_behind)
            else:
                left = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
                said_each = [ended.said[-600:] for ended in (first, second, third)]
                ended = [first.code, second.code, third.code]
                failures.append({"at": at, "codes": ended, "same": same, "differing": left[:5], "said": said_each})
                print(json.dumps(failures[-1]), file=sys.stderr, flush=True)
    told = {"calls": whole.calls, "code": whole.code, "trials": made, "codes": codes, "resumed": len(ended_well)}
    print(json.dumps(told | {"failures": failures}))


if __name__ == "__main__":
    main()
