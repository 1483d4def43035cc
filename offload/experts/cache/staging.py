"""Stream: experts that pass through lent device slots, each copied once and used while the next arrive.

The copies run beside the compute: one into a lent slot waits, by event, for the compute that used the slot
last, and the compute for the copy. The host queues both ahead and waits for the disk alone.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from offload.experts.storage.store import ExpertWeights
from offload.tiers import Key

if TYPE_CHECKING:
    from offload.experts.cache.tiered_cache import TieredCache

# For a large chunk: attention of the next layer hides the copies of a few experts.
STAGING_SLOTS = 6
_PART = 8  # but no more than this part of all


@dataclass(frozen=True)
class Batch:
    """Experts of one layer that lie on the device now: their weights, and the device addresses of their first
    bytes."""

    weights: dict[int, ExpertWeights]
    addresses: dict[int, int]


@dataclass(frozen=True)
class _Flight:
    """An expert in a lent slot or on its way; ``ticket`` is its copy's, ``free`` the slot's before it."""

    key: Key
    slot: int
    ticket: Any
    free: Any


class StagingSlots:
    """The lent slots of ``cache``'s device."""

    def __init__(self, cache: "TieredCache") -> None:
        self.cache = cache
        self._free: deque[tuple[int, Any]] = deque()  # slot, mark of the last compute that read it
        self._ahead: list[_Flight] = []

    def close(self) -> None:
        """Hand the lent slots back."""
        for flight in self._ahead:
            self._free.append((flight.slot, flight.free))
        self._ahead.clear()
        self.cache.vram.table.free.extend(slot for slot, _ in self._free)
        self._free.clear()

    def batches(self, keys: Sequence[Key], ahead: Sequence[Key]) -> Iterator[Batch]:
        """See ``TieredCache.batches``; ``borrow`` comes first."""
        cache, vram = self.cache, self.cache.vram
        hits = [key for key in keys if key in vram]
        cold = [key for key in keys if key not in vram]
        flying = deque(flight for flight in self._ahead if flight.key in cold)
        for flight in self._ahead:
            if flight not in flying:
                self._free.append((flight.slot, flight.free))
        self._ahead.clear()
        taken = {flight.key for flight in flying}
        waiting = [key for key in cold if key not in taken]
        try:
            self._start(waiting, flying, wait=False)
            if hits:
                for key in hits:
                    if key in vram.arriving:
                        cache.transfer.landed(vram.arriving[key])
                yield Batch({key[1]: vram.weights(key) for key in hits}, {key[1]: vram.address(key) for key in hits})
            while flying or waiting:
                self._start(waiting, flying, wait=not flying)
                flight = flying[0]
                cache.transfer.landed(flight.ticket)
                record = cache.store.record(*flight.key)
                address = vram.slots.address(flight.slot) + record.start
                yield Batch({flight.key[1]: vram.view(flight.slot, record)}, {flight.key[1]: address})
                self._free.append((flying.popleft().slot, cache.transfer.mark()))
        finally:  # the disk has failed, or nobody asks for the rest
            self._free.extend((flight.slot, cache.transfer.mark()) for flight in flying)
        self._look_ahead(ahead)

    def borrow(self, *, large: bool) -> None:
        """Have at least one slot lent, several for a ``large`` chunk: free ones, then those of the coldest
        experts."""
        cache, vram = self.cache, self.cache.vram
        slots = min(STAGING_SLOTS, max(cache.reserve, vram.slots.count // _PART)) if large else 1
        mark = cache.transfer.mark()
        while True:
            while vram.table.free:
                self._free.append((vram.table.free.pop(), mark))
            if len(self._free) + len(self._ahead) >= slots:
                return
            coldest = cache.swaps.coldest()
            if coldest is not None:
                cache.drop_resident(coldest)
            elif self._free or self._ahead or not cache.wait_for_slot():
                assert self._free or self._ahead, "every device slot is in use at once"
                return

    def _start(self, waiting: list[Key], flying: deque[_Flight], *, wait: bool) -> None:
        """Begin copies of ``waiting`` into the free slots, those in host slots first, and read the others
        from disk; with ``wait``, at least one is begun."""
        cache = self.cache
        locked = set(waiting)
        for key in list(waiting):
            if self._free and cache.wants_source(key, locked, wait=False):
                waiting.remove(key)
                flying.append(self._copy(key))
        if wait and not flying and waiting:
            assert self._free, "every lent slot is in use at once"
            key = waiting.pop(0)
            cache.wants_source(key, locked, wait=True)
            flying.append(self._copy(key))

    def _look_ahead(self, ahead: Sequence[Key]) -> None:
        cache = self.cache
        for key in ahead:
            if not self._free:
                return
            if key not in cache.vram and cache.wants_source(key, set(ahead), wait=False):
                self._ahead.append(self._copy(key))

    def _copy(self, key: Key) -> _Flight:
        slot, free = self._free.popleft()
        return _Flight(key, slot, self.cache.copy_to_staging(key, slot, free), free)
