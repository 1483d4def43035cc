"""The command line as a user runs it: a process of its own, through pipes or on a terminal."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from cli.main import run

ROOT = Path(__file__).resolve().parent.parent
COLDSTREAM = [sys.executable, "-m", "cli.main"]


def coldstream(*arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run ``coldstream ARGUMENTS`` to its end, with ``stdin`` in a pipe."""
    return subprocess.run(
        [*COLDSTREAM, *map(str, arguments)], cwd=ROOT, input=stdin, capture_output=True, text=True, timeout=120
    )


@dataclass(frozen=True)
class Finished:
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


def invoke(*arguments: str | Path, stdin: str | bytes = "") -> Finished:
    """``coldstream ARGUMENTS`` in this process, where torch is imported once for all tests."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", write_through=True) for _ in range(2))
    code: object = 0
    before = sys.stdin
    typed = stdin.encode() if isinstance(stdin, str) else stdin
    sys.stdin = io.TextIOWrapper(io.BytesIO(typed), "utf-8", "surrogateescape")
    try:
        with redirect_stdout(out), redirect_stderr(err):
            run([str(argument) for argument in arguments])
    except SystemExit as end:
        code = end.code
    finally:
        sys.stdin = before
    said, complained = (stream.buffer.getvalue().decode() for stream in (out, err))  # type: ignore[attr-defined]
    assert isinstance(code, int)
    if "--json" in arguments and said:
        line = said.splitlines()[-1]
        failed = code in (1, 2)  # a run that was interrupted has its document, too
        if arguments[0] == "chat" and "error" not in json.loads(line):  # a conversation in which nothing was answered
            failed = False
        check_document("error" if failed else str(arguments[0]), line)
    return Finished(code, said, complained)


def check_document(name: str, line: str) -> None:
    """Whether ``line`` is document ``name`` as its schema says, every key of it described."""
    for error in validator(name).iter_errors(json.loads(line)):
        raise AssertionError(f"{name} --json, {error.json_path}: {error.message} (cli/schemas/parts.py, documents.py)")


@cache
def validator(name: str) -> Draft202012Validator:
    """Of the schema that is shipped, without room for keys that it does not know."""
    shipped = json.loads(files("cli.schemas").joinpath(f"{name}.json").read_text(encoding="utf-8"))
    return Draft202012Validator(_closed(shipped))


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(part) for key, part in schema.items()}
    return {**closed, "additionalProperties": False} if "properties" in schema and "required" in schema else closed


class Terminal:
    """``coldstream ARGUMENTS`` on a pseudo-terminal, which a test types into and reads."""

    def __init__(self, *arguments: str | Path, **variables: str) -> None:
        ours, theirs = pty.openpty()
        self.ours = ours
        self.seen = ""
        self.process = subprocess.Popen(
            [*COLDSTREAM, *map(str, arguments)],
            cwd=ROOT,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env=os.environ | {"TERM": "dumb"} | variables,
        )
        os.close(theirs)

    def read_until(self, text: str, seconds: float = 60) -> str:
        """What appears up to and with ``text``."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            left = end - time.monotonic()
            assert left > 0, f"{text!r} did not appear within {seconds} s; seen: {self.seen[-800:]!r}"
            if select.select([self.ours], [], [], left)[0]:
                try:
                    got = os.read(self.ours, 65536)
                except OSError:  # the terminal is gone with its last process
                    got = b""
                assert got, f"the command ended before {text!r} appeared; seen: {self.seen[-800:]!r}"
                self.seen += got.decode(errors="replace")
        at = self.seen.index(text) + len(text)
        before, self.seen = self.seen[:at], self.seen[at:]
        return before

    def type(self, text: str) -> None:
        """Type ``text``; control characters work as keys do."""
        os.write(self.ours, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def wait(self, seconds: float = 30) -> int:
        """Read to the end; the exit code."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and select.select([self.ours], [], [], max(0.0, end - time.monotonic()))[0]:
            try:
                got = os.read(self.ours, 65536)
            except OSError:
                break
            if not got:
                break
            self.seen += got.decode(errors="replace")
        return self.process.wait(max(0.1, end - time.monotonic()))

    def close(self) -> None:
        """End the process if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.ours)
