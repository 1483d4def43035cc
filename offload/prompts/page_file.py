"""A page file: what some layers keep of one block of tokens, as one sequential read, any layer of it readable alone.

Bytes: a header, then keys and values of layer after layer, each a page as it lies in memory; then, where values are
int8, the f32 scales of keys and values of each layer, in the same order; zeros up to a multiple of 4,096. Where pages
are multiples of 4,096 bytes, as those of all real models are, direct I/O moves them between disk and pool without
a copy. The header is JSON: what the file is of, and an XXH64 of each page and of the scales. It takes as many bytes
for any file of the same layers, so the place of a layer follows from its index.
"""

import errno
import json
import mmap
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quant.checkpoint.layout import PAGE
from quant.errors import InputError
from quant.kernels.checksum import checksums

FILE_VERSION = 2
_MOST_PARTS = 1000  # of one system call (IOV_MAX is 1,024)
_SUMS = "xxh64"


@dataclass(frozen=True)
class PageLayout:
    """Where things lie in a page file of ``layers`` layers; sizes in bytes of a page of keys or values, and of its
    scales. ``about`` is what its header says besides."""

    layers: tuple[int, ...]
    page_nbytes: int
    scale_nbytes: int
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def header_nbytes(self) -> int:
        """Bytes before the first page."""
        return -(-(1024 + 64 * len(self.layers)) // PAGE) * PAGE

    @property
    def tail_nbytes(self) -> int:
        """Bytes after the last page."""
        return -(-2 * len(self.layers) * (self.page_nbytes + self.scale_nbytes) // PAGE) * PAGE - (
            2 * len(self.layers) * self.page_nbytes
        )

    @property
    def nbytes(self) -> int:
        """Bytes of a file."""
        return self.header_nbytes + 2 * len(self.layers) * self.page_nbytes + self.tail_nbytes

    @property
    def is_direct(self) -> bool:
        """Whether direct I/O accepts the pages."""
        return self.page_nbytes % PAGE == 0

    def place(self, layer: int) -> int:
        """Where the keys of the ``layer``-th of ``layers`` begin; the values follow."""
        return self.header_nbytes + 2 * layer * self.page_nbytes

    def header(self, key: str, tokens: int, sums: Sequence[int]) -> bytes:
        """The header of block ``key`` of ``tokens`` tokens."""
        said = {"coldstream": "kv-pages", "version": FILE_VERSION, "key": key, "tokens": tokens, "layers": self.layers}
        text = json.dumps({**said, **self.about, _SUMS: [f"{one:016x}" for one in sums]}).encode()
        assert len(text) <= self.header_nbytes, "the header's room is reckoned from the number of layers"
        return text.ljust(self.header_nbytes, b"\0")


@dataclass(frozen=True)
class BlockPages:
    """A block's pages in memory, writable: keys and values in turn, layer after layer, and their scales likewise."""

    pages: Sequence[memoryview]
    scales: Sequence[memoryview]


class SpoiledFile(InputError):
    """A page file is not as it was written."""


def read_page_file(path: Path, layout: PageLayout, key: str, tokens: int, into: BlockPages, *, direct: bool) -> None:
    """Read the file of block ``key`` into its pages. What they hold after an error is not to be used.

    Raises SpoiledFile if it is not as it was written or is something else, OSError if it cannot be read.
    """
    header, tail = aligned(layout.header_nbytes), aligned(layout.tail_nbytes)
    parts = [header, *into.pages, *([tail] if len(tail) else [])]
    descriptor = _open(path, os.O_RDONLY | os.O_NONBLOCK, direct=direct and layout.is_direct)
    try:
        size = os.fstat(descriptor).st_size
        if size != layout.nbytes:
            raise SpoiledFile(f"it has {size:,} bytes, expected {layout.nbytes:,}")
        move_all(os.preadv, descriptor, parts)
        if not direct:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    sums = checksums(parts[1:])
    if bytes(header) != layout.header(key, tokens, sums):
        raise SpoiledFile("its checksums or its header are others than expected")
    done = 0
    for scale in into.scales:
        scale[:] = tail[done : done + len(scale)]
        done += len(scale)


def write_page_file(path: Path, layout: PageLayout, key: str, tokens: int, pages: BlockPages, *, direct: bool) -> None:
    """Write what ``read_page_file`` reads, to a new file. Raises OSError."""
    header, tail = aligned(layout.header_nbytes), aligned(layout.tail_nbytes)
    done = 0
    for scale in pages.scales:
        tail[done : done + len(scale)] = scale
        done += len(scale)
    parts = [header, *pages.pages, *([tail] if len(tail) else [])]
    header[:] = layout.header(key, tokens, checksums(parts[1:]))
    descriptor = _open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, direct=direct and layout.is_direct)
    try:
        move_all(os.pwritev, descriptor, parts)
    finally:
        os.close(descriptor)


def _open(path: Path, flags: int, *, direct: bool) -> int:
    if direct:
        try:
            return os.open(path, flags | os.O_DIRECT, 0o600)
        except OSError as error:
            if error.errno != errno.EINVAL:  # which a file system without direct I/O says, maybe with the file made
                raise
    return os.open(path, flags & ~os.O_EXCL, 0o600)


def move_all(
    move: Callable[[int, list[memoryview], int], int], descriptor: int, parts: Sequence[memoryview], offset: int = 0
) -> None:
    """Have ``move`` (os.preadv, os.pwritev) take all of ``parts``, which follow one another in the file from
    ``offset``. Raises OSError."""
    waiting = list(parts)
    while waiting:
        count = move(descriptor, waiting[:_MOST_PARTS], offset)
        if count <= 0:
            raise OSError(errno.EIO, "it ended early")
        offset += count
        while waiting and count >= len(waiting[0]):
            count -= len(waiting.pop(0))
        if count:
            waiting[0] = waiting[0][count:]


def aligned(nbytes: int) -> memoryview:
    """Memory that direct I/O accepts, zeros."""
    return memoryview(mmap.mmap(-1, nbytes)) if nbytes else memoryview(bytearray())
