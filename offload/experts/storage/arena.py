"""Arena: one allocation, cut into equal page-aligned slots, one expert each.

Experts of different size share it without waste: slots are then addresses for the largest each, more of them than
there is memory for, and what counts is the memory that is touched. A slot keeps what its largest expert has touched
until ``trim`` gives back what the next one leaves over.

Anonymous memory mapped by ourselves is page-aligned, which direct I/O demands, is given huge pages where the
system grants them, and counts as resident only once touched. For a GPU it is pinned window by window: where
the system stops granting that, the slots so far are pinned and the others are not. (A pinned allocation of
torch's would be rounded up to a power of two, and be granted or refused as a whole.)
"""

import mmap
import sys

import torch
from torch import Tensor

from offload.experts.storage.transfer import Transfer
from offload.plan.footprint import HUGE_PAGE as _HUGE
from offload.plan.footprint import granularity
from quant.errors import MachineError
from quant.sizes import format_size

_WINDOW = 2**30  # bytes pinned at once
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class Arena:
    """``slots`` slots of ``slot_bytes`` bytes in host memory, pinned for ``transfer``'s device where one is
    given; ``notes`` says if not all of it is.

    With ``limit`` its user touches so many bytes at the most, what slots take counted by ``taken``, and no device
    reads it. Raises MachineError if the memory cannot be had.
    """

    def __init__(
        self, slots: int, slot_bytes: int, transfer: Transfer | None = None, *, limit: int | None = None
    ) -> None:
        assert limit is None or transfer is None, "what a device reads is there as a whole"
        self._grain = granularity(slot_bytes) if limit is not None else 1
        self.slots, self.slot_bytes = slots, -(-slot_bytes // self._grain) * self._grain
        self.nbytes = slots * self.slot_bytes if limit is None else limit
        self.whole = slots if limit is None else min(slots, limit // max(self.slot_bytes, 1))  # of the largest experts
        self.notes: list[str] = []
        self._touched = dict[int, int]()  # slot → bytes, where slots differ
        extent, flags = slots * self.slot_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        try:
            # A huge page more than needed, so that the first slot can begin on a huge page's boundary.
            more = _NO_RESERVE if limit is not None else 0
            self._map = mmap.mmap(-1, max(extent, 1) + _HUGE, flags=flags | more)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                # A huge page that two slots share would be touched by both, and given back by neither.
                small = limit is not None and self._grain < _HUGE
                self._map.madvise(mmap.MADV_NOHUGEPAGE if small else mmap.MADV_HUGEPAGE)
        except (OSError, MemoryError, ValueError) as error:
            raise MachineError(
                f"cannot allocate an arena of {format_size(self.nbytes)} for experts ({error}): lower --ram"
            ) from None
        whole = torch.frombuffer(self._map, dtype=torch.uint8)
        start = -whole.data_ptr() % _HUGE
        self._start, self._memory = start, whole[start : start + extent]
        self._transfer, self._windows = transfer, dict[int, int]()  # first slot → device address
        self._per_window = max(1, _WINDOW // slot_bytes)
        if transfer is not None:
            self._pin(transfer)

    def _pin(self, transfer: Transfer) -> None:
        for first in range(0, self.slots, self._per_window):
            count = min(self._per_window, self.slots - first)
            try:
                self._windows[first] = transfer.register(self.slot(first).data_ptr(), count * self.slot_bytes)
            except MachineError as error:
                self.notes.append(
                    f"{format_size(first * self.slot_bytes)} of {format_size(self.nbytes)} of the RAM for "
                    f"experts could be pinned ({error}): the GPU takes no share in computing the other "
                    f"{self.slots - first} experts, and copies of them to it wait for the CPU"
                )
                return

    def taken(self, nbytes: int) -> int:
        """What ``nbytes`` of an expert take of ``limit``."""
        return -(-nbytes // self._grain) * self._grain

    def trim(self, index: int, nbytes: int) -> None:
        """Slot ``index`` will hold ``nbytes``: give back what lies behind them."""
        if self._grain == 1:
            return
        now, before = self.taken(nbytes), self._touched.get(index, 0)
        if now < before:
            begin = self._start + index * self.slot_bytes
            self._map.madvise(mmap.MADV_DONTNEED, begin + now, before - now)
        self._touched[index] = now

    @property
    def memory(self) -> Tensor:
        """All slots, uint8 ``[slots · slot_bytes]``."""
        return self._memory

    def slot(self, index: int) -> Tensor:
        """Slot ``index`` as uint8 ``[slot_bytes]``."""
        return self._memory[index * self.slot_bytes : (index + 1) * self.slot_bytes]

    def buffer(self, index: int) -> memoryview:
        """Slot ``index`` as a writable buffer for reads."""
        return memoryview(self.slot(index).numpy())  # type: ignore[arg-type]

    def device_address(self, index: int) -> int:
        """The address by which the device reads slot ``index`` in place; 0 if it cannot."""
        first = index // self._per_window * self._per_window
        window = self._windows.get(first)
        return 0 if window is None else window + (index - first) * self.slot_bytes

    def unpin(self) -> None:
        """Let the device go; nothing may be reading the slots. Memory stays as it is."""
        for first in self._windows:
            assert self._transfer is not None
            self._transfer.unregister(self.slot(first).data_ptr())
        self._windows.clear()
