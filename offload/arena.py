"""Arena: one allocation, cut into equal page-aligned slots, one expert each.

Anonymous memory mapped by ourselves is page-aligned, which direct I/O demands, is given huge pages where the
system grants them, and counts as resident only once touched.
"""

import mmap

import torch
from torch import Tensor

from quant.errors import MachineError
from quant.sizes import format_size

_HUGE = 2 * 2**20


class Arena:
    """``slots`` slots of ``slot_bytes`` bytes in host memory, pinned for copies to a GPU where ``pin``.

    Raises MachineError if the memory cannot be had.
    """

    def __init__(self, slots: int, slot_bytes: int, *, pin: bool = False) -> None:
        self.slots, self.slot_bytes = slots, slot_bytes
        self.nbytes = slots * slot_bytes
        self._map: mmap.mmap | None = None
        try:
            self._memory = self._pinned() if pin else self._mapped()
        except (OSError, MemoryError, RuntimeError, ValueError) as error:
            raise MachineError(
                f"cannot allocate an arena of {format_size(self.nbytes)} for experts ({error}): lower --ram"
            ) from None

    def _mapped(self) -> Tensor:
        # A huge page more than needed, so that the first slot can begin on a huge page's boundary.
        self._map = mmap.mmap(-1, max(self.nbytes, 1) + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        whole = torch.frombuffer(self._map, dtype=torch.uint8)
        start = -whole.data_ptr() % _HUGE
        return whole[start : start + self.nbytes]

    def _pinned(self) -> Tensor:
        return torch.empty(self.nbytes, dtype=torch.uint8, pin_memory=True)

    def slot(self, index: int) -> Tensor:
        """Slot ``index`` as uint8 ``[slot_bytes]``."""
        return self._memory[index * self.slot_bytes : (index + 1) * self.slot_bytes]

    def buffer(self, index: int) -> memoryview:
        """Slot ``index`` as a writable buffer for reads."""
        return memoryview(self.slot(index).numpy())  # type: ignore[arg-type]
