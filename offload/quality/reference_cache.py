"""The user's cache of references: each made once, by one process, and used as long as it is as it was written."""

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from offload.quality.layerwise import Layerwise
from offload.quality.reference import VERSION, Reference, make_reference, reference_nbytes
from offload.quality.windows import Windows
from quant.checkpoint.checkpoint import Checkpoint
from quant.destination.writer import check_free
from quant.errors import OutputError
from quant.output_file import sync_folder, writing
from quant.progress import Progress, nobody

_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


def reference_of(
    checkpoint: Checkpoint,
    windows: Windows,
    cache: Path,
    *,
    expert_slots: int | None = None,
    progress: Progress = nobody,
) -> Reference:
    """The kept predictions of ``checkpoint`` for ``windows``, made now if ``cache`` does not have them.

    They are found by the identity of checkpoint, files and text. What was spoiled is made anew, and a note says
    so. Raises OutputError if ``cache`` cannot be written, CheckpointError if the checkpoint changes meanwhile.
    """
    identity = _identity(checkpoint, windows)
    folder = cache / identity[:16]
    notes: tuple[str, ...] = ()
    with writing(cache, resumable=False), _alone(folder, progress):
        if folder.exists():
            try:
                return Reference.open(folder, identity)
            except OutputError as error:
                notes = (f"{error}; the reference's predictions were computed anew",)
        draft = folder.with_suffix(".partial")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        try:
            check_free(draft, reference_nbytes(checkpoint.shape, windows.tokens))
            with Layerwise(checkpoint, expert_slots=expert_slots) as walk:
                make_reference(walk, windows, draft, identity, progress)
            checkpoint.check_unchanged()
            if folder.exists():
                shutil.rmtree(folder)
            draft.rename(folder)
            sync_folder(cache)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return Reference.open(folder, identity, notes)


@contextmanager
def _alone(folder: Path, progress: Progress) -> Iterator[None]:
    """While entered, no other process makes what ``folder`` is to hold. Where the file system has no locks,
    nobody can be kept out."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(0, 1, "waiting for another evaluation, which makes the same reference")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
    finally:
        os.close(descriptor)


def _identity(checkpoint: Checkpoint, windows: Windows) -> str:
    states = checkpoint.states.listed(checkpoint.files)
    text = f"{VERSION} {checkpoint.identity} {states} {windows.identity}"
    return hashlib.sha256(text.encode()).hexdigest()
