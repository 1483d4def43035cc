"""DiskPages: the part of a KV cache that is on disk, and how attention gets at it.

When pages are wanted and none is free, the oldest stretch that is in memory of some layer goes to disk. A native call
that comes upon pages that are there asks for them (``bring``), one stretch after another, and adds each to its sums as
if it had always been in memory: the result is the same to the bit.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Protocol
from weakref import WeakValueDictionary

from torch import Tensor

from offload.batch.kv_tiers import KvTiers
from offload.model.key_bounds import KeyBounds
from offload.prompts.page_file import BlockPages, aligned
from offload.prompts.page_stream import PageStream
from offload.prompts.spill_file import ALL, SpillFile, Stretch
from quant.errors import MachineError

_ALIKE = 8  # pages, whose scales are whole 4,096 bytes with a single head: where direct I/O may begin


class Spilling(Protocol):
    """A layer of a sequence whose oldest pages may go to disk; the first of them are ``on_disk``."""

    seen: int
    on_disk: list[Stretch]

    def in_memory(self, count: int) -> list[int]:
        """Its ``count`` oldest pages that are in memory."""

    def went(self, stretch: Stretch) -> None:
        """These are on disk now."""


def _nobody_leaves() -> None:
    return None


class DiskPages:
    """Pages beyond ``tiers.pages`` of a pool, in a file in ``folder``. ``page_nbytes`` and ``scale_nbytes`` are what
    keys or values of a page take; ``block_pages`` and ``memory`` give the pool's memory, of some pages and of all.

    Raises OutputError if there can be no file.
    """

    def __init__(
        self,
        tiers: KvTiers,
        folder: Path,
        page_nbytes: int,
        scale_nbytes: int,
        block_pages: Callable[[Sequence[int]], BlockPages],
        memory: Callable[[], list[memoryview]],
    ) -> None:
        self.tiers, self._sizes = tiers, (page_nbytes, scale_nbytes)
        self.file = SpillFile(folder, tiers.stretch, page_nbytes, scale_nbytes)
        self.first = -(-tiers.pages // _ALIKE) * _ALIKE  # of the pages through which stretches come
        self.end = self.first + tiers.staging_pages
        self._block_pages, self._memory = block_pages, memory
        self._layers = WeakValueDictionary[int, Spilling]()  # by the address of their tables
        self._check: Callable[[], None] = _nobody_leaves
        self._error: BaseException | None = None
        self._told = 0
        self._bounds: KeyBounds | None = None
        self._ranges = dict[Stretch, Tensor]()  # what bounds the keys of each
        self._asked = dict[Stretch, int]()  # pages that are about to be asked for
        self._last = dict[Stretch, int]()  # pages that the step asked for, as far as it chose
        self._choosing = 0  # the table of the layer that chose last

    @cached_property
    def stream(self) -> PageStream:
        """The reads. Made once the first stretch is wanted."""
        return PageStream(self.file, [self._place(index) for index in range(self.tiers.staged)])

    @property
    def reached(self) -> int:
        """Pages of the ring that were ever in use."""
        return self.tiers.staging_pages if "stream" in self.__dict__ else 0

    @property
    def used_pages(self) -> int:
        """Pages on disk."""
        return self.file.used_nbytes // self.file.nbytes * self.tiers.stretch

    def enter(self, layer: Spilling, table: int) -> None:
        """``layer``, whose table is at ``table``, may have pages on disk."""
        self._layers[table] = layer

    def spill(self) -> bool:
        """Write the oldest stretch in memory of the layer that has the most there; False if all is recent.

        Raises OutputError if the disk does not take it.
        """
        kept = self.tiers.recent
        whole = [
            layer
            for layer in self._layers.values()
            if (len(layer.on_disk) + 1) * self.tiers.stretch_tokens + kept <= layer.seen
        ]
        if not whole:
            return False
        layer = max(whole, key=lambda one: one.seen - len(one.on_disk) * self.tiers.stretch_tokens)
        pages = layer.in_memory(self.tiers.stretch)
        stretch = self.file.write(self._block_pages(pages))
        if self._bounds is not None:
            self._ranges[stretch] = self._bounds.of(pages)
        layer.went(stretch)
        return True

    def bound_by(self, bounds: KeyBounds) -> None:
        """Let native calls leave out pages by ``bounds``."""
        self._bounds = bounds
        bounds.elsewhere_by(self._ranges_of, self._need)

    def restore(self, stretch: Stretch, pages: Sequence[int]) -> None:
        """Copy the first of ``stretch`` to ``pages`` of the pool. Raises InputError if the disk does not give it."""
        page, scale = self._sizes
        parts = [aligned(self.tiers.stretch * size) for size in (page, page, scale, scale) if size]
        self.file.read(stretch, parts)
        into = self._block_pages(pages)
        for index in range(len(pages)):
            for of_values in range(2):
                place = slice(index * page, (index + 1) * page)
                into.pages[2 * index + of_values][:] = parts[of_values][place]
                if scale:
                    place = slice(index * scale, (index + 1) * scale)
                    into.scales[2 * index + of_values][:] = parts[2 + of_values][place]

    def let_go(self, stretch: Stretch) -> None:
        """A sequence has no more use for ``stretch``."""
        self.file.let_go(stretch)
        if not stretch.users:
            self._ranges.pop(stretch, None)
            self._last.pop(stretch, None)
            if "stream" in self.__dict__:
                self.stream.forget(stretch)

    @contextmanager
    def step(self, order: Sequence[tuple[Stretch, bool]], check: Callable[[], None]) -> Iterator[None]:
        """Within, native calls ask for the stretches of ``order``: for all of one, or for what they choose of it, which
        is taken to be what they chose in the step before. ``check`` is called where they wait, and breaks the call off
        by raising. What they could not be given for is raised here: InputError, or what ``check`` raised."""
        self._check, self._error = check, None
        before, self._last, self._asked, self._choosing = self._last, {}, {}, 0
        if order:
            wants = [(one, ALL if whole or self._bounds is None else before.get(one, 0)) for one, whole in order]
            self.stream.expect(want for want in wants if want[1])
        try:
            yield
        except MachineError:
            error, self._error = self._error, None
            if error is None:
                raise
            raise error from None

    def bring(self, table: int, block: int, pages: "ctypes._Pointer[ctypes.c_int32]") -> int:
        """See kernels.h."""
        try:
            whole = self.tiers.stretch
            stretch = self._layers[table].on_disk[block // whole]
            place = self.stream.take(stretch, self._check, self._asked.get(stretch, ALL))
        except BaseException as error:  # noqa: BLE001 - it is raised where the native call is made
            self._error = error
            return 0
        first, count = self.first + place * whole + block % whole, whole - block % whole
        for index in range(count):
            pages[index] = first + index
        return count

    def _ranges_of(self, table: int, block: int, found: "ctypes._Pointer[ctypes.c_void_p]") -> int:
        """See ``elsewhere`` in kernels.h."""
        whole = self.tiers.stretch
        found[0] = self._ranges[self._layers[table].on_disk[block // whole]][block % whole].data_ptr()
        return whole - block % whole

    def _need(self, table: int, blocks: "ctypes._Pointer[ctypes.c_int64]", count: int) -> None:
        """See kernels.h."""
        try:
            whole, layer, asked = self.tiers.stretch, self._layers[table], dict[Stretch, int]()
            for block in blocks[:count]:
                stretch = layer.on_disk[block // whole]
                asked[stretch] = asked.get(stretch, 0) | 1 << block % whole
            self._asked.update(asked)
            for stretch, pages in asked.items():
                self._last[stretch] = self._last.get(stretch, 0) | pages
            over = self._layers[self._choosing].on_disk if self._choosing not in (0, table) else ()
            self._choosing = table
            self.stream.correct(asked, over)
        except BaseException as error:  # noqa: BLE001 - it is raised where the native call is made
            self._error = error

    def take_read_nbytes(self) -> int:
        """Bytes that were asked of the disk since the last call."""
        if "stream" not in self.__dict__:
            return 0
        before, self._told = self._told, self.stream.read_nbytes
        return self._told - before

    def close(self) -> None:
        """End the reads, and give the disk space back."""
        if "stream" in self.__dict__:
            self.stream.close()
        self.file.close()

    def _place(self, index: int) -> list[memoryview]:
        first = self.first + index * self.tiers.stretch
        sizes = [self._sizes[0]] * 2 + [self._sizes[1]] * 2
        return [
            part[first * size : (first + self.tiers.stretch) * size]
            for part, size in zip(self._memory(), sizes, strict=False)
        ]
