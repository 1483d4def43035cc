"""StagingSlots: experts that pass through slots of the device, each copied once and used while the next arrive.

The copies run beside the compute: one into a staging slot waits, by event, for the compute that used the slot
last, and the compute for the copy. The host queues both ahead and waits for the disk alone.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from offload.experts.cache.device_tier import DeviceTier, HostSource
from offload.tiers import Key

_SLOTS = 6  # for a large chunk: attention of the next layer hides the copies of a few experts
_PART = 8  # but no more than this part of all


@dataclass(frozen=True)
class _Copy:
    """An expert in a staging slot or on its way; ``ticket`` is its copy's, ``free`` the slot's before it."""

    key: Key
    slot: int
    ticket: Any
    free: Any


class StagingSlots:
    """Slots that ``tier`` can spare while a prompt is computed, for experts that come from ``host``."""

    def __init__(self, tier: DeviceTier, host: HostSource) -> None:
        self.tier, self.host = tier, host
        self._free: deque[tuple[int, Any]] = deque()  # slot, mark of the last compute that read it
        self._ahead: list[_Copy] = []

    @property
    def slots(self) -> int:
        """How many slots there are now."""
        return len(self._free) + len(self._ahead)

    def open(self, *, large: bool) -> None:
        """Have at least one slot, several for a ``large`` chunk: free ones, then those of the coldest
        experts."""
        tier, table = self.tier, self.tier.slot_table
        wanted = min(_SLOTS, max(tier.reserve, tier.slots.count // _PART)) if large else 1
        mark = tier.transfer.mark()
        while True:
            while table.free:
                self._free.append((table.free.pop(), mark))
            if self.slots >= wanted:
                return
            coldest = tier.coldest()
            if coldest is not None:
                tier.drop(coldest)
            elif self.slots or not tier.wait_for_source(land=True):
                assert self.slots, "every device slot is in use at once"
                return

    def close(self) -> None:
        """Hand the slots back."""
        self._discard_ahead(())
        self.tier.slot_table.free.extend(slot for slot, _ in self._free)
        self._free.clear()

    def batches(self, keys: Sequence[Key], ahead: Sequence[Key]) -> Iterator[dict[int, int]]:
        """See ``TieredCache.batches``; ``open`` comes first."""
        tier, transfer = self.tier, self.tier.transfer
        hits = [key for key in keys if key in tier]
        cold = [key for key in keys if key not in tier]
        copies = self._discard_ahead(cold)
        taken = {copy.key for copy in copies}
        waiting = [key for key in cold if key not in taken]
        try:
            self._start(waiting, copies, wait=False)
            if hits:
                for key in hits:
                    if key in tier.arriving:
                        transfer.landed(tier.arriving[key])
                yield {key[1]: tier.slot_table.slot_of[key] for key in hits}
            while copies or waiting:
                self._start(waiting, copies, wait=not copies)
                copy = copies[0]
                transfer.landed(copy.ticket)
                yield {copy.key[1]: copy.slot}
                self._free.append((copies.popleft().slot, transfer.mark()))
        finally:  # the disk has failed, or the caller wants no more
            self._free.extend((copy.slot, transfer.mark()) for copy in copies)
        for key in ahead:
            if self._free and key not in tier and self.host.demand_source(key, set(ahead), wait=False):
                self._ahead.append(self._copy(key))

    def _discard_ahead(self, wanted: Sequence[Key]) -> deque[_Copy]:
        """The copies begun ahead that are of ``wanted`` experts; the slots of the others are free."""
        copies = deque(copy for copy in self._ahead if copy.key in wanted)
        self._free.extend((copy.slot, copy.free) for copy in self._ahead if copy.key not in wanted)
        self._ahead.clear()
        return copies

    def _start(self, waiting: list[Key], copies: deque[_Copy], *, wait: bool) -> None:
        """Begin copies of ``waiting`` into the free slots, those in host slots first, and read the others
        from disk; with ``wait``, at least one is begun."""
        locked = set(waiting)
        for key in list(waiting):
            if self._free and self.host.demand_source(key, locked, wait=False):
                waiting.remove(key)
                copies.append(self._copy(key))
        if wait and not copies and waiting:
            assert self._free, "every staging slot is in use at once"
            key = waiting.pop(0)
            self.host.demand_source(key, locked, wait=True)
            copies.append(self._copy(key))

    def _copy(self, key: Key) -> _Copy:
        slot, free = self._free.popleft()
        return _Copy(key, slot, self.tier.stage(key, slot, free), free)
