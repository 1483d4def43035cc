"""Where a checkpoint grows until it is whole, and how it comes to its destination.

A destination that is not there yet grows in DST.partial beside it and appears by one rename. A directory that
is there, and must be empty, is filled: it may be a mount point, over which nothing can be renamed, or lie in a
folder that is not ours to write. In it the checkpoint grows in DST/.partial; when all is whole its files move
up one by one, and config.json, without which no directory is a model, is the last. Links are followed.

The partial folder holds, beside drafts:

    lock            held by the run at work; made first and removed last, so that the folder is known for ours
    calibration/    what was measured before the first file was made
    model/          the files of the checkpoint
    journal.jsonl   what is being made, how much of it is on disk, and whether all is

At every moment a run may die: the journal says what a later one has to do. It is removed before anything
that it speaks of.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from quant.destination.journal import Journal
from quant.errors import OutputError
from quant.output_file import sync_folder, writing

_LAST = "config.json"
_FOREIGN = ("lost+found",)  # what a new file system has at its top
_LONGEST_NAME, _LONGEST_PATH = 255, 4095  # bytes
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


class Staging:
    """The partial folder of one destination; as a context it lets go of the lock, and of a folder that holds
    nothing to go on from."""

    def __init__(self, destination: Path | str) -> None:
        """Raises OutputError if no path can be made of ``destination``."""
        if not str(destination).strip():
            raise OutputError("the destination has an empty name: expected that of a directory")
        with writing(Path(destination)):
            self.destination = Path(destination).absolute()
            self.target = Path(os.path.realpath(self.destination))
            beside = self.target.parent / f"{self.target.name}.partial"
            self.is_inside = self.target.is_dir() and not beside.is_dir()
        self.folder = self.target / ".partial" if self.is_inside else beside
        self.model = self.folder / "model"
        self.work = self.folder / "calibration"
        self._journal_file = self.folder / "journal.jsonl"
        self._lock_file = self.folder / "lock"
        self._lock: int | None = None
        self._journal: Journal | None = None
        self._made: list[Path] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def is_published(self) -> bool:
        """Whether a whole model is at the destination, this run's or another."""
        with writing(self.destination):
            return (self.target / _LAST).exists()

    @property
    def nearest(self) -> Path:
        """The nearest folder above that exists: its file system will hold the destination."""
        with writing(self.folder):
            return next(folder for folder in [self.folder, *self.folder.parents] if folder.exists())

    @property
    def nbytes(self) -> int:
        """Bytes that the model already takes on disk."""
        with writing(self.model):
            return sum(file.stat().st_blocks * 512 for file in self.model.glob("*")) if self.model.is_dir() else 0

    def check(self, source: Path | None, resume: bool) -> None:
        """Raise OutputError if the destination is taken or cannot be, or an unfinished run is not to be
        resumed. Nothing is written. ``source`` must not hold the destination."""
        with writing(self.destination):
            self._check_names()
            if source is not None and self.target.is_relative_to(source.resolve()):
                raise OutputError(f"{self.destination} lies in the source {source}: choose another destination")
            if self.target.is_symlink():  # all that can be followed were
                raise OutputError(f"{self.destination} is a link that leads in a circle: choose another destination")
            if self.target.exists() and not self.target.is_dir():
                raise OutputError(f"{self.destination} is a file: expected a new or empty directory")
            begun = self._journal_file.exists()
            if any(self._strangers()) and not (self.is_inside and begun):
                raise OutputError(f"{self.destination} is not empty: choose another destination or remove it first")
            left = self.folder.exists() and [path for path in self.folder.iterdir() if path.name != "journal.new"]
            if left and not begun and not self._lock_file.exists():
                raise OutputError(
                    f"{self.folder} has no journal, so it is no unfinished run: move it away or choose another "
                    "destination"
                )
            if not self.is_inside and os.path.ismount(self.target):
                raise OutputError(
                    f"{self.destination} is a mount point, but {self.folder} was begun when it was none: unmount it, "
                    "or remove that folder"
                )
            if self.folder.exists() and not resume:
                raise OutputError(
                    f"{self.folder} is left from a run that did not finish: continue it with --resume, or remove it"
                )

    def check_new(self) -> None:
        """As ``check``, for a run that cannot be resumed."""
        if self.is_begun:
            raise OutputError(f"{self.folder} is left from a run that did not finish: remove it first")
        self.check(None, resume=False)

    def _check_names(self) -> None:
        """A file's name deep in the folder may be as long as names get."""
        if len(os.fsencode(self.model)) + _LONGEST_NAME > _LONGEST_PATH:
            raise OutputError(f"{self.destination} is too long a path for the files in it: choose a shorter one")

    def _strangers(self) -> Iterator[Path]:
        """What is in the destination beside the partial folder."""
        if self.target.is_dir():
            yield from (path for path in self.target.iterdir() if path != self.folder and path.name not in _FOREIGN)

    def claim(self) -> None:
        """Make the partial folder, which shows that it can be written, and keep other runs out of it.

        Raises OutputError if it cannot be made or another run has it.
        """
        with writing(self.folder):
            self._made = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock = os.open(self._lock_file, os.O_RDWR | os.O_CREAT, 0o666)
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Whoever held it until now may have removed the file with the folder.
                is_free = os.fstat(self._lock).st_nlink > 0
            except BlockingIOError:
                is_free = False
            except OSError as error:
                is_free = error.errno in _NO_LOCKS  # a file system without locks: nobody can be kept out
                if not is_free:
                    self.close()
                    raise
        if not is_free:
            self._let_go()
            self._made = []
            raise OutputError(f"{self.folder} is being written by another run: wait for it, or stop it")

    def _let_go(self) -> None:
        if self._lock is not None:
            with suppress(OSError):
                os.close(self._lock)
            self._lock = None

    def open(self, job: dict[str, Any]) -> Journal:
        """The journal of this job, continued where a run left one, new otherwise. Raises OutputError."""
        with writing(self.folder):
            if self._journal_file.exists():
                self._journal = Journal.resume(self._journal_file, job)
                if self._journal.done and not self._journal.complete and not self.model.is_dir():
                    raise OutputError(
                        f"{self.model} is gone, of which {self._journal_file} says what was done: remove {self.folder} "
                        "and start again without --resume"
                    )
                if not self._journal.complete:
                    self.model.mkdir(exist_ok=True)
                return self._journal
            if self.model.exists():
                shutil.rmtree(self.model)  # of a run that was giving up
            self.model.mkdir()
            self._journal = Journal.create(self._journal_file, job)
            sync_folder(self.folder)
        return self._journal

    def create(self) -> None:
        """Make the folder of the model for a run that cannot be resumed. Raises OutputError."""
        self.claim()
        with writing(self.model):
            self.model.mkdir()

    def publish(self) -> None:
        """Bring the finished model to the destination and remove the partial folder.

        May have been begun by a run that died on the way. Raises OutputError if something else came there.
        """
        with writing(self.destination):
            if self.is_inside:
                self._move_up()
            elif self.model.is_dir():
                sync_folder(self.model)
                self.model.rename(self.target)
                sync_folder(self.target.parent)
            elif not (self.target / _LAST).exists():
                raise OutputError(
                    f"{self.destination} was complete and has been taken away since: remove {self.folder} and start "
                    "again without --resume"
                )
        self.discard()

    def _move_up(self) -> None:
        if self.model.is_dir():
            sync_folder(self.model)
            for path in sorted(self.model.iterdir(), key=lambda path: (path.name == _LAST, path.name)):
                if (self.target / path.name).exists():
                    raise OutputError(
                        f"{self.destination} got a {path.name} of somebody else while it was made: remove that and "
                        "run again with --resume"
                    )
                if path.name == _LAST:
                    sync_folder(self.target)
                path.rename(self.target / path.name)
        sync_folder(self.target)

    @property
    def is_begun(self) -> bool:
        """Whether there is a partial folder."""
        with writing(self.folder):
            return self.folder.exists()

    def discard(self) -> None:
        """Remove the partial folder and all that is in it. Raises OutputError."""
        self._close_journal()
        with writing(self.folder):
            if self.folder.exists():
                self._journal_file.unlink(missing_ok=True)
                for path in list(self.folder.iterdir()):
                    if path.is_dir():
                        shutil.rmtree(path)
                    elif path != self._lock_file:
                        path.unlink()
                self._lock_file.unlink(missing_ok=True)
                self.folder.rmdir()
        self._let_go()

    def close(self) -> None:
        """Let go of the journal and the lock; of the folder, too, if nothing in it is worth to go on from."""
        self._close_journal()
        if self._lock is not None or self._made:
            with suppress(OSError, OutputError):  # what made the run fail is to be heard, not this
                if not self._is_worthwhile():
                    self.discard()
                    for folder in self._made:
                        if folder.exists():
                            folder.rmdir()
        self._made = []
        self._let_go()

    def _is_worthwhile(self) -> bool:
        """Whether a part or a measurement is done."""
        parts = self._journal_file.read_bytes().count(b"\n") - 1 if self._journal_file.exists() else 0
        return parts > 0 or (self.work.is_dir() and any(self.work.iterdir()))

    def _close_journal(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None
