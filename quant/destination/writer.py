"""The files of a checkpoint being written: space taken up front, bytes put at their places, in any order."""

import errno
import os
from contextlib import suppress
from pathlib import Path

from quant.checkpoint.layout import CheckpointLayout
from quant.errors import OutputError
from quant.output_file import writing
from quant.sizes import format_size


def check_free(folder: Path, needed: int) -> None:
    """Raise OutputError if the file system of ``folder`` has less than ``needed`` bytes free."""
    with writing(folder):
        status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if needed > free:
        raise OutputError(
            f"{folder} has {format_size(free)} free, but the output needs {format_size(needed)}: "
            "free some or choose another destination"
        )


class OutputFiles:
    """The safetensors files of ``layout`` under ``folder``, open for writing."""

    def __init__(self, folder: Path, layout: CheckpointLayout) -> None:
        self.folder = folder
        self._descriptors: dict[str, int] = {}
        self._dirty: set[str] = set()
        self._layout = layout

    def create(self) -> None:
        """Make every file in full size, with its header and constant tensors; contents that exist are kept.

        Raises OutputError if the disk cannot hold them.
        """
        for file in self._layout.files:
            path = self.folder / file.name
            with writing(path):
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
                self._descriptors[file.name] = descriptor
                _allocate(descriptor, file.nbytes)
            self.write(file.name, 0, memoryview(file.header))
        for key, data in self._layout.constants.items():
            self.write(*self._layout.place(key), memoryview(data))

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Put ``data`` at ``offset`` of file ``name``. Raises OutputError."""
        self._dirty.add(name)
        with writing(self.folder / name):
            while data:
                count = os.pwrite(self._descriptors[name], data, offset)
                data, offset = data[count:], offset + count

    def sync(self, only: str | None = None) -> None:
        """Wait until what was written, to all files or to one, is on disk. Raises OutputError."""
        for name in sorted(self._dirty) if only is None else [only]:
            with writing(self.folder / name):
                os.fdatasync(self._descriptors[name])
            self._dirty.discard(name)

    def close(self) -> None:
        """Let go of the files; what counts has been synced, so that an error here changes nothing."""
        for descriptor in self._descriptors.values():
            with suppress(OSError):
                os.close(descriptor)
        self._descriptors.clear()


def _allocate(descriptor: int, nbytes: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(descriptor, nbytes)  # a file system that reserves nothing: ENOSPC may come later
