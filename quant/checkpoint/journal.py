"""The record of a conversion under way: what is being made, and how many of its parts are safely on disk.

A line of JSON each: first the job (source, schemes, layout), then one line per part that is done, with the
sums its report needs. A line is appended only after the part's bytes are on disk, so a run that was killed at
any moment goes on after the last whole line. The file is locked while a run writes it.
"""

import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quant.errors import OutputError

Sums = list[list[float]]


class Journal:
    """Lines of parts done, in order. ``done`` holds each one's ``[squared_sum, squared_error]`` per piece."""

    def __init__(self, path: Path, job: dict[str, Any], done: list[Sums], descriptor: int) -> None:
        self.path = path
        self.job = job
        self.done = done
        self._descriptor = descriptor

    @classmethod
    def create(cls, path: Path, job: dict[str, Any]) -> "Journal":
        """Start a journal: it exists with its job line whole, or not at all."""
        draft = path.with_suffix(".new")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        journal = cls(path, job, [], descriptor)
        journal._lock()
        os.write(descriptor, _line(job))
        os.fsync(descriptor)
        draft.rename(path)
        return journal

    @classmethod
    def resume(cls, path: Path, job: dict[str, Any]) -> "Journal":
        """Open the journal of a run that stopped. Raises OutputError if it is another's or unreadable."""
        descriptor = os.open(path, os.O_RDWR)
        journal = cls(path, job, [], descriptor)
        try:
            journal._lock()
            whole = path.read_bytes().rpartition(b"\n")[0]
            lines = [json.loads(line) for line in whole.split(b"\n")]
            journal._check_job(lines[0])
        except (ValueError, KeyError, TypeError):
            os.close(descriptor)
            raise OutputError(
                f"{path} is no journal that can be continued: remove {path.parent} and start again without --resume"
            ) from None
        except OutputError:
            os.close(descriptor)
            raise
        journal.done = lines[1:]
        # What follows the last whole line was being written when the run was killed.
        os.ftruncate(descriptor, len(whole) + 1)
        os.lseek(descriptor, 0, os.SEEK_END)
        return journal

    def append(self, parts: Sequence[Sums]) -> None:
        """Record that ``parts`` follow what is done, and their bytes are on disk."""
        self.done.extend(parts)
        os.write(self._descriptor, b"".join(_line(sums) for sums in parts))
        os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{self.path.parent} is being written by another run: wait for it, or stop it") from None

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
