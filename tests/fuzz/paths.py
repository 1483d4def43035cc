"""Every option and argument that takes a path, given every wrong kind of file: it is refused in one line, or of use.

    python -m tests.fuzz.paths [--only generate,bench] [--part N/M]

Which they are is read from the commands themselves, so a new one is tried by itself. Each is tried in a fork of this
process, without root's right to read what nobody may. Of ``--part N/M`` every M-th case is tried, another
one for each option, so that each kind of file meets each option in one of the commands that have it. Prints every case
that fails.
"""

import argparse
import ctypes
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from cli.main import COMMANDS, build_app
from tests.fuzz import pairs
from tests.fuzz.ground import measure_nothing

PATHS = {"FILE", "DIR", "[DIR]", "SRC", "DST", "MODEL", "TRACE", "NAME|FILE", "[SHAPE]"}  # what their values are called
OTHERS = {
    *(
        "SIZE",
        "TOKENS",
        "N",
        "NAME",
        "TEXT",
        "SCHEME",
        "BITS",
        "CARD",
        "SHARE",
        "PASSES",
        "TOKENS/S",
        "GB/S",
        "PROMPT",
        "T",
        "K",
    ),
    *("P", "R", "ADDRESS", "KEY", "URL", "SECONDS", "HOST|FOLDER/", "N,N,…", "PART", None),
}
BASES: dict[str, list[str]] = {
    **pairs.BASES,
    "profile": ["{stored}", "--text", "{text.txt}", "--tokens", "16", "--out", "{made.json}", "--device", "cpu"],
    "chat": ["{stored}"],
    "eval": [
        "{stored}",
        "--reference",
        "{source}",
        "--text",
        "{text.txt}",
        "--windows",
        "1",
        "--cache",
        "{cache/kept}",
    ],
    "check": ["{stored}", "--for", "vllm"],
    "synth": ["scout", "{out}"],
    "probe": ["{text}"],
    "simulate": ["{stored}", "--trace", "{trace.json}", "--tokens", "2"],
    "rank-policies": ["{trace.json}", "--tokens", "4"],
    "demo": [],
}
_WORKED = 0.6  # seconds of a processor's time
_ANY_FILE = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
KINDS = (
    *("{folder}", "{pipe}", "{socket}", "{empty}", "{bytes}", "{dangling}", "{loop}", "{forbidden}", "{closed}/file"),
    *(
        "/dev/null",
        "/dev/full",
        "{absent}",
        "{text.txt}/file",
        "{long}",
        "{deep}",
        "{a\nb}",
        "{\x1b[31mred\x07}",
        "{\x7f}",
    ),
)


def make_kinds(folder: Path) -> None:
    """A file of each kind in ``folder``."""
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    bound = socket.socket(socket.AF_UNIX)
    bound.bind(str(folder / "socket"))
    bound.close()
    (folder / "empty").touch()
    (folder / "bytes").write_bytes(bytes(range(256)) * 40)
    (folder / "dangling").symlink_to("nothing")
    (folder / "loop").symlink_to("loop")
    for name in ("a\nb", "\x1b[31mred\x07"):
        (folder / name).write_text("Neither a model nor a profile.\n")
    (folder / "forbidden").write_text("{}")
    (folder / "closed").mkdir()
    for path in (folder / "forbidden", folder / "closed"):
        path.chmod(0)


def takers(command: str) -> Iterator[tuple[str, int]]:
    """Options of ``command`` that take a path, by their names, and the places of its arguments that do."""
    group: Any = typer.main.get_command(build_app(command))
    place = 0
    for parameter in group.commands[command].params:
        argument = parameter.param_type_name == "argument"
        if parameter.metavar in PATHS:
            yield ("", place) if argument else (parameter.opts[0], -1)
        elif parameter.metavar not in OTHERS:
            raise AssertionError(f"{command} {parameter.opts[0]} takes a {parameter.metavar}: is that a path?")
        place += argument


def cases(commands: list[str]) -> list[tuple[str, list[str]]]:
    """A command and its words, for each kind of file in each place that takes one."""
    found = []
    for command in commands:
        for option, place in takers(command):
            for kind in KINDS:
                words = list(BASES[command])
                if option in words:
                    words[words.index(option) + 1] = kind
                elif option:
                    words += [option, kind]
                elif place < len(words):
                    words[place] = kind
                else:
                    words.append(kind)
                found.append((command, words))
    return found


class PathTrials(pairs.Trials):
    """Commands of a user who may not read everything. One that has worked for a while has taken the path."""

    interrupted = frozenset(COMMANDS)

    def enough(self, child: int, seconds: float) -> bool:
        """See Trials; whoever waits for something works no more."""
        return pairs.worked(child) > _WORKED

    def before(self) -> None:
        """See Trials."""
        os.environ["HOME"] = str(self.folder)
        libc, sets = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 6)()
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        libc.capget(header, sets)
        sets[0] &= ~_ANY_FILE  # of those in effect
        if libc.capset(header, sets):
            raise OSError(ctypes.get_errno(), "root's right to read anything cannot be given up")

    def found(self, words: list[str]) -> list[str]:
        """See Trials; and names that are too long."""
        names = {"{long}": "x" * 300, "{deep}": "/".join(["y" * 200] * 30)}
        return [
            str(self.folder / names[word]) if word in names else super(PathTrials, self).found([word])[0]
            for word in words
        ]


def main() -> int:
    """Exit code 1 if a case fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.paths", description=__doc__)
    parser.add_argument("--only", default=",".join(COMMANDS))
    parser.add_argument("--part", default="0/1")
    asked = parser.parse_args()
    number, parts = map(int, asked.part.split("/"))
    pairs.SECONDS = 20.0
    measure_nothing()
    codes: Counter[str] = Counter()
    failed = 0
    with tempfile.TemporaryDirectory(prefix="coldstream-paths-") as temporary:
        folder = Path(temporary) / "ground"
        subprocess.run([sys.executable, "-m", "tests.fuzz.pairs", "--make", str(folder)], check=True)
        make_kinds(folder)
        trials = PathTrials(folder, folder)
        pairs.import_once()

        started = time.monotonic()
        for place, (command, words) in enumerate(cases(asked.only.split(","))):
            if place % parts != number:
                continue
            wrong, code, _ = trials.ended([command, *trials.found(words)])
            codes[code] += 1
            if wrong:
                failed += 1
                print(f"{command} {words!r}\n    {wrong}", flush=True)
        ended = ", ".join(f"{count} ended with {code}" for code, count in codes.most_common())
        print(f"{codes.total()} in {time.monotonic() - started:.0f} s, {ended}; {failed} failed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
