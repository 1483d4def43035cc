"""DeviceCache: which experts hold the device's slots, and which of them may be used.

An expert arrives (its copy is under way), is resident, and is forgotten. Free slots carry copies that stay
only for a moment: swaps, and experts that a prompt streams through.
"""

from typing import Any

from torch import Tensor

from offload.experts.storage.slots import DeviceSlots, SlotTable
from offload.experts.storage.store import ExpertRecord, ExpertStore, ExpertWeights, Layout
from offload.experts.storage.transfer import Transfer
from offload.tiers import Key, Tier


class DeviceCache:
    """``slots`` device slots for the experts of ``store``; at least ``least`` must be had."""

    tier: Tier = "vram"

    def __init__(self, transfer: Transfer, store: ExpertStore, slots: int, *, least: int = 1) -> None:
        self.transfer, self.store = transfer, store
        self.slots = DeviceSlots(transfer, slots, store.slot_bytes, least=least)
        self.table = SlotTable(self.slots.count)
        self.arriving: dict[Key, Any] = {}
        self._views: dict[tuple[int, Layout], ExpertWeights] = {}

    def __contains__(self, key: Key) -> bool:
        """Whether ``key`` is resident or arriving."""
        return key in self.table

    def resident(self, key: Key) -> bool:
        """Whether ``key`` has landed."""
        return key in self.table and key not in self.arriving

    @property
    def free(self) -> int:
        """How many slots hold nothing."""
        return len(self.table.free)

    def arrive(self, key: Key, source: Tensor) -> Any:
        """Begin copying ``key`` from its host slot to a free one here; returns the copy's ticket."""
        slot = self.table.take(key)
        self.arriving[key] = self.transfer.copy(source, self.slots.view(slot))
        return self.arriving[key]

    def landed(self) -> list[Key]:
        """The experts whose copies have landed since the last call: resident now."""
        found = [key for key, ticket in self.arriving.items() if self.transfer.poll(ticket)]
        for key in found:
            # The host has seen the copy end; compute is told as well, in the queues' own terms.
            self.transfer.landed(self.arriving.pop(key))
        return found

    def forget(self, key: Key) -> None:
        """Let ``key``'s slot be used for another. A copy into it waits for the compute queued so far."""
        self.arriving.pop(key, None)
        self.table.release(key)

    def address(self, key: Key) -> int:
        """The device address of ``key``'s first byte."""
        return self.slots.address(self.table.slot_of[key]) + self.store.record(*key).start

    def weights(self, key: Key) -> ExpertWeights:
        """``key``'s weights on the device."""
        return self.view(self.table.slot_of[key], self.store.record(*key))

    def view(self, slot: int, record: ExpertRecord) -> ExpertWeights:
        """The weights of the expert of ``record`` in ``slot``."""
        view_key = (slot, record.layout)
        if view_key not in self._views:
            self._views[view_key] = record.view(self.slots.view(slot))
        return self._views[view_key]

    def regain(self, first: int) -> None:
        """Have the slots again of the dropped segment that began with ``first``, all of them free. Raises
        BudgetError if the device has no memory for it."""
        self.table.free += self.slots.regain(first)

    def drop(self, segment: range) -> int:
        """Give the memory of ``segment`` back, in which no expert may be left. Returns its bytes."""
        assert not any(slot in segment for slot in self.table.slot_of.values())
        self.table.free = [slot for slot in self.table.free if slot not in segment]
        for view_key in [found for found in self._views if found[0] in segment]:
            del self._views[view_key]  # a view left would keep the memory
        return self.slots.drop(segment)
