"""The record of a conversion under way: what is being made, and how many of its parts are safely on disk.

A line of JSON each: first the job (source, schemes, layout), then one line per part that is done, with the
sums its report needs, and at last one that says that the whole model is there. A line is appended only after
the part's bytes are on disk, so a run that was killed at any moment goes on after the last whole line.
"""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, FiniteFloat, TypeAdapter

from quant.errors import OutputError
from quant.input_file import read_bytes
from quant.output_file import writing

Sums = list[list[float]]
_COMPLETE = "complete"
_MOST_BYTES = 2**30
_DONE: TypeAdapter[list[Sums]] = TypeAdapter(
    list[list[Annotated[list[Annotated[FiniteFloat, Field(ge=0, strict=True)]], Field(min_length=2, max_length=2)]]]
)


class Journal:
    """Lines of parts done, in order. ``done`` holds each one's ``[squared_sum, squared_error]`` per piece;
    ``complete`` says that nothing is left but to bring the model to its destination."""

    def __init__(self, path: Path, job: dict[str, Any], done: list[Sums], descriptor: int) -> None:
        self.path = path
        self.job = job
        self.done = done
        self.complete = False
        self._descriptor = descriptor

    @classmethod
    def create(cls, path: Path, job: dict[str, Any]) -> "Journal":
        """Start a journal: it exists with its job line whole, or not at all. Raises OutputError."""
        draft = path.with_suffix(".new")
        with writing(path):
            journal = cls(path, job, [], os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666))
            try:
                journal._write(_line(job))
                draft.rename(path)
            except OSError:
                journal.close()
                raise
        return journal

    @classmethod
    def resume(cls, path: Path, job: dict[str, Any]) -> "Journal":
        """Open the journal of a run that stopped. Raises OutputError if it is another's or unreadable."""
        with writing(path):
            journal = cls(path, job, [], os.open(path, os.O_RDWR))
            try:
                journal._continue()
            except (OSError, OutputError):
                journal.close()
                raise
        return journal

    def _continue(self) -> None:
        """Read what is done, and cut off what was being written when the run was killed."""
        whole = read_bytes(self.path, OutputError, _MOST_BYTES).rpartition(b"\n")[0]
        try:
            lines = [json.loads(line) for line in whole.split(b"\n")]
            self._check_job(lines[0])
            self.complete = lines[-1] == _COMPLETE
            self.done = _DONE.validate_python(lines[1:-1] if self.complete else lines[1:])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise self._unreadable() from None
        os.ftruncate(self._descriptor, len(whole) + 1)
        os.lseek(self._descriptor, 0, os.SEEK_END)

    def check_parts(self, pieces: Sequence[int]) -> None:
        """Raise OutputError unless what is done is the beginning of parts with so many ``pieces``, and all of them
        where the model is complete."""
        found = [len(sums) for sums in self.done]
        if found != list(pieces[: len(found)]) or (self.complete and len(found) < len(pieces)):
            raise self._unreadable()

    def _unreadable(self) -> OutputError:
        return OutputError(
            f"{self.path} is no journal that can be continued: remove {self.path.parent} and start again without "
            "--resume"
        )

    def append(self, parts: Sequence[Sums]) -> None:
        """Record that ``parts`` follow what is done, and their bytes are on disk. Raises OutputError."""
        self._write(b"".join(_line(sums) for sums in parts))
        self.done.extend(parts)

    def finish(self) -> None:
        """Record that every file of the model is on disk. Raises OutputError."""
        self._write(_line(_COMPLETE))
        self.complete = True

    def close(self) -> None:
        """Let go of the file. What is in it counts, so that an error here changes nothing."""
        with suppress(OSError):
            os.close(self._descriptor)

    def _write(self, data: bytes) -> None:
        with writing(self.path):
            while data:
                data = data[os.write(self._descriptor, data) :]
            os.fsync(self._descriptor)

    def _check_job(self, found: dict[str, Any]) -> None:
        for key, expected in self.job.items():
            if found[key] != expected:
                raise OutputError(
                    f"{self.path.parent} was begun with another {key} ({_short(found[key])}, now "
                    f"{_short(expected)}): "
                    "resume with the same, or remove it and start again without --resume"
                )


def _line(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
