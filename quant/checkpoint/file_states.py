"""Which state of its files a model was read in: that of each file by its size, time of change and inode.

Reading takes a while, and a download, a sync or another conversion may overwrite, replace or cut a file
meanwhile. What was read is of one model only if every file still is in the state that it was in before the
first header was read.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Self

from quant.errors import CheckpointError

State = tuple[int, int, int, int]  # bytes, nanoseconds, device, inode


class FileStates:
    """The states of some files at one moment."""

    def __init__(self, states: Mapping[Path, State]) -> None:
        self._states = states

    @classmethod
    def of_folder(cls, folder: Path) -> Self:
        """Of every file in ``folder`` itself. What cannot be read is left to whoever needs it."""
        states: dict[Path, State] = {}
        try:
            for path in folder.iterdir():
                found = _state(path)
                if isinstance(found, tuple):
                    states[path] = found
        except OSError:
            return cls({})
        return cls(states)

    def check(self, files: Iterable[Path]) -> None:
        """Raise CheckpointError, naming the first, if one of ``files`` is in another state now."""
        for file in files:
            self._compare(file, _state(file))

    def check_open(self, file: Path, descriptor: int) -> None:
        """Raise CheckpointError if what is open as ``descriptor`` is not ``file`` in the state it was in."""
        self._compare(file, _numbers(os.fstat(descriptor)))

    def _compare(self, file: Path, now: State | str) -> None:
        before = self._states.get(file)
        if before != now:
            raise CheckpointError(
                f"{file} {_what(before, now)} while it was read: what was made of it would be of two models; "
                "start again when nothing writes there any more"
            )

    def listed(self, files: Iterable[Path]) -> list[list[object]]:
        """Name, size and time of change of each of ``files``: the same for the same files on another day.

        Raises CheckpointError for one whose folder could not be listed when this was made.
        """
        found = [(file, self._states.get(file)) for file in files]
        for file, state in found:
            if state is None:
                raise CheckpointError(
                    f"{file.parent} could not be listed when {file.name} was opened: whether that changes cannot be "
                    "seen; make the folder readable, and start again"
                )
        return [[file.name, *state[:2]] for file, state in found if state is not None]


def _state(file: Path) -> State | str:
    try:
        return _numbers(os.stat(file))
    except OSError as error:
        return error.strerror or str(error)


def _numbers(found: os.stat_result) -> State:
    return found.st_size, found.st_mtime_ns, found.st_dev, found.st_ino


def _what(before: State | None, now: State | str) -> str:
    if before is None:
        return "appeared"
    if isinstance(now, str):
        return f"went away ({now})"
    if now[2:] != before[2:]:
        return "was replaced"
    return "was cut short" if now[0] < before[0] else "was overwritten"
