"""DeviceTier: the device's slots for experts, which expert is in which, and the table by which kernels find them.

An expert is copied from its host slot to a free slot here. It is *arriving* while that copy runs and *resident*
once it has landed; its host slot is free from then on. One that must make way for another is *leaving* until its
host copy has been read from disk again. Weights are immutable, so an expert is dropped by forgetting it.
"""

from typing import Any, Protocol

from torch import Tensor

from offload.experts.cache.address_table import PINNED, VRAM, AddressTable
from offload.experts.storage.device_slots import DeviceSlots
from offload.experts.storage.slot_table import SlotTable
from offload.experts.storage.store import ExpertStore, ExpertWeights, Layout
from offload.experts.storage.transfer import Transfer
from offload.plan.placement import vram_reserve
from offload.routing.frequency import ExpertFrequency, Mask
from offload.tiers import Key


class HostSource(Protocol):
    """Experts in host slots, from which copies to the device are made."""

    def whole(self, key: Key) -> bool:
        """Whether all of ``key``'s bytes are in a host slot."""

    def reading(self, key: Key) -> bool:
        """Whether ``key`` is on its way from disk to a host slot."""

    def demand_source(self, key: Key, locked: set[Key], *, wait: bool) -> bool:
        """Whether ``key`` is whole. If it is not, its read begins, unless that would take a slot of one of
        ``locked``; with ``wait``, that read is awaited. Raises CheckpointError if the disk fails."""

    def read_behind(self, key: Key, *, evict: bool) -> None:
        """Begin reading ``key`` behind everything else, if it has no host slot and one is free or, with
        ``evict``, another's can be had."""

    def source(self, key: Key) -> Tensor:
        """``key``'s host slot, uint8, to be copied to the device. Counts the copy."""

    def release(self, key: Key) -> None:
        """Forget ``key``'s host slot."""

    def device_address(self, key: Key) -> int:
        """Where the device reads ``key`` in its host slot; 0 if it is not whole there, or not pinned."""


class DeviceTier:
    """``slots`` device slots for the experts of ``store``, or as many as can be had.

    ``frequency`` says which are worth a slot. ``reserve`` of the slots hold no expert for good: what only passes
    through needs them. ``arriving`` has the ticket of each copy under way, ``leaving`` each expert that makes
    way, and for whom. Raises BudgetError if the device has memory for less than the reserve.
    """

    def __init__(
        self, transfer: Transfer, store: ExpertStore, slots: int, host: HostSource, frequency: ExpertFrequency
    ) -> None:
        self.transfer, self.store, self.host, self.frequency = transfer, store, host, frequency
        least = max(1, vram_reserve(slots, store.count))
        self.slots = DeviceSlots(transfer, slots, store.slot_bytes, least=least)
        self.slot_table = SlotTable(self.slots.count)
        self.address_table = AddressTable(store.shape.moe_layers, store.shape.num_experts, transfer)
        self.reserve = vram_reserve(self.slots.count, store.count)
        self.arriving: dict[Key, Any] = {}
        self.leaving: dict[Key, Key] = {}
        self._passing: dict[Key, Any] = {}  # experts that are copied to staging slots, and tickets
        self._views: dict[tuple[int, Layout], ExpertWeights] = {}

    def __contains__(self, key: Key) -> bool:
        """Whether ``key`` is resident or arriving."""
        return key in self.slot_table

    def resident(self, key: Key) -> bool:
        """Whether ``key`` has landed."""
        return key in self.slot_table and key not in self.arriving

    @property
    def free(self) -> int:
        """How many slots hold nothing."""
        return len(self.slot_table.free)

    def residents(self) -> Mask:
        """The experts that have landed, bool ``[rows, experts]``."""
        found: Mask = self.address_table.noted_places == VRAM
        return found

    def coldest(self) -> Key | None:
        """The resident that is asked for least; one that is leaving anyway goes first."""
        leaving = next((key for key in self.leaving if self.resident(key)), None)
        return leaving or self.frequency.coldest(self.residents())

    def load(self, key: Key) -> None:
        """Begin copying ``key`` from its host slot to a free slot, to stay there."""
        slot = self.slot_table.take(key)
        self.arriving[key] = self.transfer.copy(self.host.source(key), self.slots.view(slot))

    def land(self) -> None:
        """Make residents of the experts whose copies have landed since the last call, and free their host
        slots. No step may be running that reads those."""
        for key in [key for key, ticket in self.arriving.items() if self.transfer.poll(ticket)]:
            # The host has seen the copy end; for compute it is over only once its queue has waited for it.
            self.transfer.landed(self.arriving.pop(key))
            if self.host.whole(key):
                self.host.release(key)
            self.address_table.set(key, VRAM, self.address(self.slot_table.slot_of[key], key))

    def drop(self, key: Key) -> None:
        """Forget ``key``, which the device finds in its host slot from now on, if it has one. A copy into its
        device slot waits for the compute queued so far."""
        self.leaving.pop(key, None)
        self.arriving.pop(key, None)
        self.slot_table.release(key)
        self.host_changed(key)

    def host_changed(self, key: Key) -> None:
        """``key`` has come to a host slot or left it: note where the device finds it, unless it is resident."""
        if self.resident(key):
            return
        address = self.host.device_address(key)
        if address:
            self.address_table.set(key, PINNED, address)
        else:
            self.address_table.clear(key)

    def stage(self, key: Key, slot: int, after: Any) -> Any:
        """Begin copying ``key`` from its host slot to a staging ``slot``, once the compute that ``after`` marks is
        done. Returns the ticket."""
        ticket = self._passing[key] = self.transfer.copy(self.host.source(key), self.slots.view(slot), after)
        return ticket

    def sources(self) -> set[Key]:
        """Experts whose host slots copies may be reading."""
        self._passing = {key: ticket for key, ticket in self._passing.items() if not self.transfer.poll(ticket)}
        return self._passing.keys() | self.arriving.keys()

    def wait_for_source(self, *, land: bool) -> bool:
        """Wait until a copy has read its host slot; False if none is under way. Copies of experts that stay are
        waited for only if those may ``land`` now."""
        if self._passing:
            self.transfer.done(self._passing.pop(next(iter(self._passing))))
            return True
        if self.arriving and land:
            self.transfer.done(next(iter(self.arriving.values())))
            self.land()
            return True
        return False

    def address(self, slot: int, key: Key) -> int:
        """The device address of ``key``'s first byte in ``slot``."""
        return self.slots.view(slot).data_ptr() + self.store.record(*key).start

    def weights(self, slot: int, key: Key) -> ExpertWeights:
        """The weights of ``key`` in ``slot``."""
        record = self.store.record(*key)
        view_key = (slot, record.layout)
        if view_key not in self._views:
            self._views[view_key] = record.view(self.slots.view(slot))
        return self._views[view_key]

    def coldest_segment(self) -> range | None:
        """The segment whose experts are asked for least; None if it is the last one."""
        segments = self.slots.segments()
        holding, score = {slot: key for key, slot in self.slot_table.slot_of.items()}, self.frequency.score
        if len(segments) < 2:
            return None
        return min(segments, key=lambda part: sum(score(holding[slot]) for slot in part if slot in holding))

    def give_back(self, segment: range) -> int:
        """Drop the experts of ``segment`` and give its memory back to the driver; returns its bytes. No copy
        may be under way, nor any compute."""
        for key in [key for key, slot in self.slot_table.slot_of.items() if slot in segment]:
            self.drop(key)
        self.slot_table.free = [slot for slot in self.slot_table.free if slot not in segment]
        for view_key in [found for found in self._views if found[0] in segment]:
            del self._views[view_key]  # a view left would keep the memory
        nbytes = self.slots.give_back(segment)
        self._resized()
        return nbytes

    def regain(self, first: int) -> None:
        """Take memory again for the segment that began with slot ``first``, all of its slots free. Raises
        BudgetError if the device has none for it."""
        self.slot_table.free += self.slots.allocate(first)
        self._resized()

    def _resized(self) -> None:
        self.reserve = vram_reserve(self.slots.count, self.store.count)
        self.address_table.flush()
