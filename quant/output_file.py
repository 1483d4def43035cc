"""Files that are written: whole or not at all, each failure one line that says what to do.

A file that a command was asked for is checked before the work (``check_output``) and appears by a rename when
it is whole (``replacing``), so that a run that fails leaves what was there. Only a file of the kind that is about
to be written is ever replaced; its beginning says what it is. A run that is killed can leave a draft,
``.coldstream-`` and a hash of the name: the next one for the same name takes it over.
"""

import errno
import fcntl
import hashlib
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
_STDOUT = 1
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
    with writing(path):
        _fill(path, data)


def _fill(path: Path, data: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def sync_file(path: Path) -> None:
    """Wait until what ``path`` holds is on disk. Raises OutputError."""
    with writing(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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

    A device is written as it is. Raises OutputError.
    """
    with writing(path, resumable=False):
        if _is_device(path):
            yield path
            return
        target = Path(os.path.realpath(path))
        with _drafted(target) as draft:
            yield draft
            _move(draft, target)


@contextmanager
def _drafted(target: Path) -> Iterator[Path]:
    """An empty file beside ``target`` that is removed afterwards; ``target`` where nothing new can be made there."""
    usual = target.with_name(f".coldstream-{hashlib.blake2b(os.fsencode(target.name), digest_size=8).hexdigest()}")
    try:
        draft, descriptor = _new_draft(usual)
    except OSError as error:
        if error.errno not in _NOT_REPLACED or not target.is_file():
            raise
        yield target
        return
    try:
        yield draft
    finally:
        with suppress(OSError):
            if draft.stat().st_ino == os.fstat(descriptor).st_ino:  # it was not moved to its place
                draft.unlink()
        with suppress(OSError):
            os.close(descriptor)


def _new_draft(usual: Path) -> tuple[Path, int]:
    """An empty draft, ``usual`` if that can be had, and a descriptor of it, which holds its lock."""
    if (descriptor := _taken(usual)) is not None:
        return usual, descriptor
    other = usual.with_name(f"{usual.name}-{secrets.token_hex(4)}")
    return other, os.open(other, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)


def _taken(draft: Path) -> int | None:
    """A descriptor of ``draft``, emptied and locked, new or as a killed run left it; None if a run is writing it, or if
    it is nothing that a run of this user would have left. Raises OSError if nothing can be made there."""
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError:
        if os.path.lexists(draft):
            return None
        raise
    with suppress(OSError):  # without locks there is another name
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found, named = os.fstat(descriptor), draft.lstat()
        is_file = stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and found.st_uid == os.geteuid()
        if is_file and (found.st_dev, found.st_ino) == (named.st_dev, named.st_ino):
            os.ftruncate(descriptor, 0)
            return descriptor
    os.close(descriptor)
    return None


def _move(draft: Path, target: Path) -> None:
    sync_file(draft)
    if draft != target:
        with suppress(FileNotFoundError):
            draft.chmod(stat.S_IMODE(target.stat().st_mode))
        try:
            draft.replace(target)
        except OSError as error:
            if error.errno not in _NOT_REPLACED or not target.is_file():
                raise
            _fill(target, draft.read_bytes())  # a mount point, as a container has it for one file
    sync_folder(target.parent)


def check_output(path: Path | None, option: str, mark: bytes) -> None:
    """Raise OutputError now, not after the work, if what ``option`` names cannot be written; UsageError for ``-``.

    A file that is there is replaced only if its beginning holds ``mark``, which says that it is of the kind to be
    written (or if it is empty); everything else is somebody's.
    """
    if path is None:
        return
    named = f"{option} {path}".strip()
    if str(path) == "-":
        raise UsageError(f"{named}: expected the name of a file; stdout is for the answer, or the document of --json")
    with writing(path, resumable=False):
        if _is_device(path):
            _check_device(path)
            return
        target, state = Path(os.path.realpath(path)), _state(path)
        if state is not None and stat.S_ISDIR(state.st_mode):
            raise OutputError(f"{named}: found a directory: expected the name of a file in it")
        if state is not None and not stat.S_ISREG(state.st_mode):
            raise OutputError(f"{named}: found a pipe or a device: expected the name of a file")
        if not target.parent.is_dir():
            raise OutputError(f"{named}: found no directory {target.parent}; make it first")
        if state is not None:
            with target.open("rb") as stream:
                head = stream.read(_HEAD)
            if head and mark not in head:
                raise OutputError(
                    f"{named}: found a file that is not of this kind: choose another name, or remove it first"
                )
            os.close(os.open(target, os.O_WRONLY))
        if not os.statvfs(target.parent).f_bavail:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with _drafted(target):
            pass


def save_output(path: Path, data: bytes, mark: bytes) -> None:
    """Write ``data`` to ``path`` by the rule of ``check_output``, whole or not at all. Raises OutputError."""
    check_output(path, "", mark)
    replace_file(path, data)


def check_stdout() -> None:
    """Raise OutputError now, not after the work, if nothing can be written to stdout: a full device or disk."""
    with writing(Path("stdout"), resumable=False):
        os.write(_STDOUT, b"")
        if stat.S_ISREG(os.fstat(_STDOUT).st_mode) and not os.fstatvfs(_STDOUT).f_bavail:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _state(path: Path) -> os.stat_result | None:
    """What lies at ``path``, links followed; None if nothing does. Raises OSError for what can be no path."""
    try:
        return path.stat()
    except FileNotFoundError:
        return None
    except ValueError as error:  # a NUL byte, or half of a character
        raise OSError(errno.EINVAL, "it is no name that a file can have") from error


def _is_device(path: Path) -> bool:
    """Whether ``path`` is one that characters can be written to, as a terminal is."""
    state = _state(path)
    return state is not None and stat.S_ISCHR(state.st_mode)


def _check_device(path: Path) -> None:
    """Writing nothing to a full device fails."""
    descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        os.write(descriptor, b"")
    finally:
        os.close(descriptor)
