"""Files that are written: whole or not at all, each failure one line that says what to do.

A file that a command was asked for is checked before the work (``check_output``) and appears by a rename when
it is whole (``replacing``), so that a run that fails leaves what was there. Only what Coldstream wrote itself is
ever replaced.
"""

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from quant.errors import OutputError, UsageError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REMEDIES = {
    errno.ENAMETOOLONG: "choose a shorter one",
    errno.EROFS: "choose a place that can be written",
    errno.EACCES: "choose a place that is yours to write, or change its permissions",
    errno.EBUSY: "something else uses it, or it is a mount point",
}
_NOT_REPLACED = (errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM, errno.EROFS)
_HEAD = 2**16  # bytes of a file in which it says what it is


@contextmanager
def writing(path: Path, *, resumable: bool = True) -> Iterator[None]:
    """Turn a failing system call on ``path`` into an OutputError that says what to do."""
    try:
        yield
    except OSError as error:
        said = f"{path} cannot be written: {error.strerror or error}"
        if error.errno in _FULL:
            again = "free some and run again with --resume" if resumable else "free some and run again"
            said = f"no space left to write {path} ({error.strerror}): {again}, or choose another destination"
        elif remedy := _REMEDIES.get(error.errno or 0):
            said += f"; {remedy}"
        raise OutputError(said) from error


def write_file(path: Path, data: bytes) -> None:
    """Write a small file and wait until it is on disk. Raises OutputError."""
    with writing(path), path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the names in ``path`` are on disk. Raises OutputError."""
    with writing(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def replace_file(path: Path, data: bytes) -> None:
    """Make ``data`` the contents of ``path``, or leave it as it is. Raises OutputError."""
    with replacing(path) as draft:
        draft.write_bytes(data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to; when all went well it becomes ``path``, else it is removed.

    A device or a pipe is written as it is. Raises OutputError.
    """
    with writing(path, resumable=False):
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            yield target
            return
        draft = _draft(target)
        try:
            yield draft
            _move(draft, target)
        finally:
            with suppress(OSError):
                draft.unlink(missing_ok=True)


def _draft(target: Path) -> Path:
    """A new empty file beside ``target``, or in its place where nothing new can be made there."""
    draft = target.with_name(f".coldstream-{secrets.token_hex(4)}")
    try:
        os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    except OSError as error:
        if error.errno not in _NOT_REPLACED or not target.is_file():
            raise
        return target
    return draft


def _move(draft: Path, target: Path) -> None:
    descriptor = os.open(draft, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if draft != target:
        with suppress(FileNotFoundError):
            draft.chmod(stat.S_IMODE(target.stat().st_mode))
        draft.replace(target)
    sync_folder(target.parent)


def check_name(path: Path, option: str) -> Path:
    """Where a file that ``option`` names would lie. Raises OutputError now, not after the work, if nothing can lie
    there, and UsageError for ``-``."""
    if str(path) == "-":
        raise UsageError(
            f"{option} -: expected the name of a file; stdout is for the answer, or the document of --json"
        )
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise OutputError(f"{option} {path}: found a directory: expected the name of a file in it")
    if not target.parent.is_dir():
        raise OutputError(f"{option} {path}: found no directory {target.parent}; make it first")
    return target


def check_output(path: Path | None, option: str, mark: bytes) -> None:
    """Raise OutputError now, not after the work, if what ``option`` names cannot be written.

    A file that is there is replaced only if its beginning holds ``mark``, which says that Coldstream wrote it
    (or if it is empty); everything else is somebody's.
    """
    if path is None:
        return
    with writing(path, resumable=False):
        target = check_name(path, option)
        if target.exists() and not target.is_file():
            _check_device(target)
            return
        if target.exists():
            with target.open("rb") as stream:
                head = stream.read(_HEAD)
            if head and mark not in head:
                raise OutputError(
                    f"{option} {path}: found a file that is not of this kind: choose another name, or remove it first"
                )
            os.close(os.open(target, os.O_WRONLY))
        elif not os.statvfs(target.parent).f_bavail:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        draft = _draft(target)
        if draft != target:
            draft.unlink()


def check_stream(descriptor: int, name: str) -> None:
    """Raise OutputError if nothing can be written to an open ``descriptor``: a full device, a full disk."""
    with writing(Path(name), resumable=False):
        os.write(descriptor, b"")
        if stat.S_ISREG(os.fstat(descriptor).st_mode) and not os.fstatvfs(descriptor).f_bavail:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _check_device(target: Path) -> None:
    """Writing nothing to a full device fails; a pipe that nobody reads yet is left alone."""
    if not stat.S_ISCHR(target.stat().st_mode):
        return
    descriptor = os.open(target, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        os.write(descriptor, b"")
    finally:
        os.close(descriptor)
