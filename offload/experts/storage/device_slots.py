"""DeviceSlots: device memory cut into equal slots, one expert each.

The slots lie in a few allocations rather than one: such a segment can be handed back to the driver when
another program needs the memory, and the experts of the others stay where they are.
"""

from torch import Tensor

from offload.experts.storage.transfer import Transfer
from quant.errors import BudgetError
from quant.kernels.cuda.layout import MAX_ALIGNMENT
from quant.sizes import format_size

_SEGMENTS = 8
_SEGMENT = 512 * 2**20  # bytes that one has at the most: what is lost where a little memory is missing


class DeviceSlots:
    """``slots`` slots of ``slot_bytes`` bytes on the device, in eight segments or, for large slots, more.

    Where the device refuses some of them, ``count`` is smaller and ``notes`` says so. Raises BudgetError if
    fewer than ``least`` can be had.
    """

    def __init__(self, transfer: Transfer, slots: int, slot_bytes: int, *, least: int = 1) -> None:
        self.transfer, self.slot_bytes = transfer, slot_bytes
        self.notes: list[str] = []
        self._memory: dict[int, Tensor] = {}  # first slot → uint8 [slots of the segment, slot_bytes]
        each = min(-(-slots // _SEGMENTS), max(1, _SEGMENT // slot_bytes))
        self._each, self._planned = each, slots
        for first in range(0, slots, max(each, 1)):
            try:
                self.allocate(first)
            except BudgetError as error:
                if first < least:
                    raise
                self.notes.append(
                    f"the GPU gave memory for {first} of {slots} expert slots "
                    f"({format_size(first * slot_bytes)} of {format_size(slots * slot_bytes)}): more experts "
                    f"are computed from RAM ({error})"
                )
                break

    @property
    def count(self) -> int:
        """How many slots there are now."""
        return sum(len(memory) for memory in self._memory.values())

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that the slots take now."""
        return self.count * self.slot_bytes

    def view(self, slot: int) -> Tensor:
        """Slot ``slot`` as uint8 ``[slot_bytes]``."""
        first = slot // self._each * self._each
        return self._memory[first][slot - first]

    def segments(self) -> list[range]:
        """The slots of each segment."""
        return [range(first, first + len(memory)) for first, memory in self._memory.items()]

    def segment_bytes(self, first: int) -> int:
        """Bytes of the segment that begins with slot ``first``."""
        return min(self._each, self._planned - first) * self.slot_bytes

    def allocate(self, first: int) -> range:
        """Take memory for the segment that begins with slot ``first``, which has none. Raises BudgetError if
        the device has none."""
        memory = self.transfer.allocate(self.segment_bytes(first) // self.slot_bytes, self.slot_bytes)
        assert not memory.data_ptr() % MAX_ALIGNMENT, "kernels are told that slots begin there"
        self._memory[first] = memory
        return range(first, first + len(memory))

    def give_back(self, segment: range) -> int:
        """Give the memory of ``segment``, whose slots nothing may use any more, back to the driver. Returns
        its bytes."""
        memory = self._memory.pop(segment.start)
        nbytes = memory.nbytes
        del memory
        self.transfer.reclaim()
        return nbytes
