"""DST.partial: where a checkpoint grows until it is whole, so that DST is either complete or not there.

It holds ``journal.jsonl`` and ``model/``, which is renamed to DST at the end: one step that either happened
or not.
"""

import shutil
from pathlib import Path
from typing import Any

from quant.checkpoint.journal import Journal
from quant.checkpoint.writer import sync_folder, writing
from quant.errors import OutputError


class Staging:
    """The partial folder of one destination."""

    def __init__(self, destination: Path) -> None:
        self.destination = destination.absolute()
        self.folder = self.destination.with_name(self.destination.name + ".partial")
        self.model = self.folder / "model"
        self._journal_file = self.folder / "journal.jsonl"

    @property
    def is_finished(self) -> bool:
        """Whether the destination already holds something."""
        return self.destination.is_dir() and any(self.destination.iterdir())

    @property
    def nearest(self) -> Path:
        """The nearest folder above that exists: its file system will hold the destination."""
        return next(folder for folder in [self.folder, *self.folder.parents] if folder.exists())

    def check_new(self) -> None:
        """Raise OutputError if the destination is taken or another run's partial folder is there."""
        self._check_destination()
        if self.folder.exists():
            raise OutputError(f"{self.folder} is left from a run that did not finish: remove it first")

    def create(self) -> None:
        """Make the partial folder of a run that cannot be resumed."""
        with writing(self.model):
            self.model.mkdir(parents=True)

    def check(self, source: Path, resume: bool) -> None:
        """Raise OutputError if the destination is taken, or an unfinished run is not to be resumed."""
        if self.destination.resolve().is_relative_to(source.resolve()):
            raise OutputError(f"{self.destination} lies in the source {source}: choose another destination")
        if self.destination.exists() and not self.destination.is_dir():
            raise OutputError(f"{self.destination} is a file: expected a new or empty directory")
        if self.is_finished:
            raise OutputError(f"{self.destination} is not empty: choose another destination or remove it first")
        if self.folder.exists() and not resume:
            raise OutputError(
                f"{self.folder} is left from a run that did not finish: continue it with --resume, or remove it"
            )
        strangers = self.folder.exists() and not self._journal_file.exists() and self._entries()
        if strangers:
            raise OutputError(
                f"{self.folder} has no journal, so it is no unfinished run: move it away or choose another destination"
            )

    def _check_destination(self) -> None:
        if self.destination.exists() and not self.destination.is_dir():
            raise OutputError(f"{self.destination} is a file: expected a new or empty directory")
        if self.is_finished:
            raise OutputError(f"{self.destination} is not empty: choose another destination or remove it first")

    def _entries(self) -> list[str]:
        return [path.name for path in self.folder.iterdir() if path.name != "journal.new"]

    def open(self, job: dict[str, Any]) -> Journal:
        """The journal of this job, continued where a run left one, new otherwise. Raises OutputError."""
        if self._journal_file.exists():
            journal = Journal.resume(self._journal_file, job)
        else:
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                journal = Journal.create(self._journal_file, job)
        with writing(self.model):
            self.model.mkdir(exist_ok=True)
        return journal

    def publish(self) -> None:
        """Rename the finished model to the destination and remove the partial folder."""
        with writing(self.destination):
            sync_folder(self.model)
            self.model.rename(self.destination)
            sync_folder(self.destination.parent)
        self.discard()

    def discard(self) -> None:
        """Remove the partial folder and all that is in it."""
        if self.folder.exists():
            with writing(self.folder):
                shutil.rmtree(self.folder)
