"""SpillFile: stretches of KV pages on disk, each written once and read by every step that looks at it.

Bytes of a stretch: the keys of its pages, their values; where values are int8, the f32 scales of all keys, those of all
values; zeros up to a multiple of 4,096. An XXH64 of each page's keys, of its values and of the scales of both stays in
memory. The file has no name: it goes away with the process, whatever ends that.
"""

import errno
import os
import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from offload.prompts.page_file import BlockPages, aligned, move_all
from quant.checkpoint.layout import PAGE
from quant.errors import InputError, OutputError
from quant.kernels.checksum import checksums
from quant.sizes import format_size

ALL = -1  # pages of a stretch, one bit each


@dataclass(eq=False)
class Stretch:
    """Pages on disk, the ``place``-th of the file. ``users`` sequences look at them."""

    place: int
    sums: bytes
    users: int = 1


class SpillFile:
    """A file in ``folder`` for stretches of ``pages`` pages, of ``page_nbytes`` bytes of keys or values each and
    ``scale_nbytes`` of their scales. ``notes`` says so if direct I/O is refused.

    Raises OutputError if there can be none.
    """

    def __init__(self, folder: Path, pages: int, page_nbytes: int, scale_nbytes: int) -> None:
        self.folder, self.pages, self.notes = folder, pages, list[str]()
        self._page_nbytes, self._scale_nbytes = page_nbytes, scale_nbytes
        self.nbytes = -(-2 * pages * (page_nbytes + scale_nbytes) // PAGE) * PAGE  # of a stretch
        self._free, self._end = list[int](), 0
        self._tail = aligned(2 * pages * scale_nbytes)
        sizes = (page_nbytes, pages * scale_nbytes)
        self._file = self._open(direct=all(size % PAGE == 0 for size in sizes))

    @property
    def used_nbytes(self) -> int:
        """Bytes of the file that stretches take."""
        return (self._end - len(self._free)) * self.nbytes

    def write(self, pages: BlockPages) -> Stretch:
        """Put ``pages`` on disk: keys and values in turn, and their scales. Raises OutputError."""
        place = self._free.pop() if self._free else self._end
        scales, done = [*pages.scales[::2], *pages.scales[1::2]], 0
        for scale in scales:
            self._tail[done : done + len(scale)] = scale
            done += len(scale)
        parts = [*pages.pages[::2], *pages.pages[1::2], *([self._tail] if done else [])]
        try:
            move_all(os.pwritev, self._file, parts, place * self.nbytes)
        except OSError as error:
            if place < self._end:
                self._free.append(place)
            raise OutputError(
                f"the KV cache cannot be written to {self.folder} ({error.strerror}), {format_size(self.used_nbytes)} "
                "of it are there: make room, or start again with a smaller --context or more --kv-ram"
            ) from None
        self._end = max(self._end, place + 1)
        return Stretch(place, _sums([*pages.pages[::2], *pages.pages[1::2], *scales]))

    def read(self, stretch: Stretch, into: Sequence[memoryview], pages: int = ALL) -> None:
        """Read ``stretch``, all of it or some ``pages``: ``into`` are its keys, its values and, where there are any,
        the scales of both, each in one piece. Raises InputError if the disk does not give it as it was written."""
        start, which = stretch.place * self.nbytes, [i for i in range(self.pages) if pages >> i & 1]
        try:
            if pages == ALL:
                move_all(os.preadv, self._file, into, start)
            else:
                for first, end in _runs(which):
                    self._read_run(first, end, into, start)
        except OSError as error:
            raise InputError(f"the KV cache cannot be read from {self.folder} ({error.strerror})") from None
        sizes = [self._page_nbytes] * 2 + [self._scale_nbytes] * (len(into) - 2)
        pieces = [part[i * size : (i + 1) * size] for part, size in zip(into, sizes, strict=True) for i in which]
        known = array("Q", stretch.sums)
        if list(checksums(pieces)) != [known[part * self.pages + i] for part in range(len(into)) for i in which]:
            raise InputError(
                f"the KV cache in {self.folder} is not as it was written (its checksums are others than expected): the "
                "disk is failing, or something else has written there; give another folder with --kv-disk"
            )

    def _read_run(self, first: int, end: int, into: Sequence[memoryview], start: int) -> None:
        """Pages ``first`` to ``end`` of the stretch at ``start``. Of scales whole 4,096 bytes, as direct I/O wants
        them: the others among them are this stretch's own. Raises OSError."""
        for part, size in zip(into, [self._page_nbytes] * 2 + [self._scale_nbytes] * 2, strict=False):
            low, high = first * size // PAGE * PAGE, min(len(part), -(-end * size // PAGE) * PAGE)
            if size == self._page_nbytes:
                low, high = first * size, end * size
            move_all(os.preadv, self._file, [part[low:high]], start + low)
            start += self.pages * size

    def read_nbytes(self, pages: int) -> int:
        """Bytes that reading these ``pages`` of a stretch takes."""
        if pages == ALL:
            return self.nbytes
        scales = -(-self._scale_nbytes // PAGE) * PAGE
        return 2 * (self._page_nbytes + scales) * (pages & (1 << self.pages) - 1).bit_count()

    def let_go(self, stretch: Stretch) -> None:
        """One sequence less looks at ``stretch``."""
        stretch.users -= 1
        if not stretch.users:
            self._free.append(stretch.place)

    def close(self) -> None:
        """Give the disk space back."""
        os.close(self._file)

    def _open(self, *, direct: bool) -> int:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor, path = tempfile.mkstemp(prefix=".coldstream-kv-", dir=self.folder)
            try:
                if not direct:
                    return descriptor
                try:
                    again = os.open(path, os.O_RDWR | os.O_DIRECT)
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
                    self.notes.append(
                        f"direct I/O is refused where {self.folder} lies: the KV cache on disk goes through the page "
                        "cache, which takes memory beside --ram"
                    )
                    return descriptor
                os.close(descriptor)
                return again
            finally:
                os.unlink(path)
        except OSError as error:
            raise OutputError(f"no KV cache can be kept in {self.folder} ({error.strerror or error})") from None


def _runs(which: Sequence[int]) -> list[tuple[int, int]]:
    """First and end of those of ``which``, ascending, that follow one another."""
    found = list[tuple[int, int]]()
    for index in which:
        if found and found[-1][1] == index:
            found[-1] = found[-1][0], index + 1
        else:
            found.append((index, index + 1))
    return found


def _sums(pieces: Sequence[memoryview]) -> bytes:
    """Checksums of ``pieces``, as few bytes as can be: there are millions of pages."""
    return array("Q", checksums(pieces)).tobytes()
