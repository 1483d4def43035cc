"""What is where: experts in host slots and device slots, fetched, kept and evicted.

Weights are immutable, so eviction is forgetting: nothing is ever written back, and an expert that has a
device slot needs no host slot. All state is changed by the thread that runs the model; reading threads only
fill buffers.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal, Protocol

import torch

from offload.arena import Arena
from offload.loan import Loans
from offload.reader import Priority, Reader, Request
from offload.records import Tier
from offload.store import ExpertRecord, ExpertStore, ExpertWeights, Layout
from offload.transfer import Transfer
from quant.errors import CheckpointError

Key = tuple[int, int]
_IN_FLIGHT = 8


class Policy(Protocol):
    """Decides which expert to forget. Sees keys only."""

    def touch(self, key: Key) -> None:
        """``key`` was used."""

    def victim(self, resident: Iterable[Key], locked: set[Key]) -> Key:
        """The resident key to forget; never one of ``locked``."""


@dataclass
class Counters:
    """Requests by the tier that held the expert, and bytes fetched, since the last ``take``."""

    by_tier: dict[Tier, int] = field(default_factory=lambda: {"vram": 0, "ram": 0, "disk": 0})
    fetched: dict[Literal["disk", "pcie"], int] = field(default_factory=lambda: {"disk": 0, "pcie": 0})
    used_bytes: dict[Tier, int] = field(default_factory=lambda: {"vram": 0, "ram": 0, "disk": 0})


class Listener(Protocol):
    """Is told what a host slot holds, so that it can address resident experts without asking."""

    def coming(self, key: Key, weights: ExpertWeights) -> None:
        """``key``'s bytes will be read to where ``weights`` view them, which stay valid until it is
        evicted."""

    def landed(self, key: Key, whole: bool) -> None:
        """``key``'s bytes are all there, or could not be read. Called by a reading thread."""

    def evicted(self, key: Key) -> None:
        """``key``'s slot is about to be overwritten."""


class SlotTable:
    """Which key holds which slot of one tier."""

    def __init__(self, slots: int) -> None:
        self.free = list(range(slots - 1, -1, -1))
        self.slot_of: dict[Key, int] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self.slot_of

    def take(self, key: Key) -> int:
        """A free slot, now ``key``'s."""
        slot = self.free.pop()
        self.slot_of[key] = slot
        return slot

    def release(self, key: Key) -> None:
        """Forget ``key``; its slot is free."""
        self.free.append(self.slot_of.pop(key))


class ExpertCache:
    """Serves the experts of a layer from device slots, host slots or disk.

    ``ram_slots`` host slots and ``vram_slots`` device slots; with no device slots, experts are computed from
    host slots where they lie. At least two host slots are needed unless every expert fits the device.
    """

    def __init__(
        self, store: ExpertStore, reader: Reader, transfer: Transfer, policy: Callable[[], Policy], *,
        ram_slots: int, vram_slots: int = 0, pinned: Sequence[Key] = (), loans: Loans | None = None,
    ) -> None:  # fmt: skip
        self.store, self.reader, self.transfer = store, reader, transfer
        pin = transfer.device.type == "cuda"
        self.arena = Arena(ram_slots, store.slot_bytes, pin=pin)
        self.device_memory = transfer.allocate(vram_slots, store.slot_bytes) if vram_slots else None
        self.host, self.device = SlotTable(ram_slots), SlotTable(vram_slots)
        self.host_policy, self.device_policy = policy(), policy()
        self.counters = Counters()
        self._pending: dict[Key, Request] = {}
        self._tickets: dict[Key, Any] = {}
        self._draining: dict[int, Any] = {}
        self._views: dict[tuple[Tier, int, Layout], ExpertWeights] = {}
        self.loans, self._lent = loans, dict[Key, ExpertWeights]()
        self.listener: Listener | None = None
        self.pinned = frozenset(pinned)
        self._pin(pinned)

    def take_counters(self) -> Counters:
        """The counts since the last call."""
        counters, self.counters = self.counters, Counters()
        return counters

    @cached_property
    def holds_all(self) -> bool:
        """Whether every expert has a slot of its own."""
        return self.arena.slots + len(self.pinned) >= self.store.count

    def tier_of(self, key: Key) -> Tier:
        """Where ``key`` is now; an expert still on its way counts as on disk."""
        if key in self.device:
            return "vram"
        if key in self._lent:
            return "ram"
        if key not in self.host:
            return "disk"
        pending = self._pending.get(key)
        return "ram" if pending is None or pending.done.is_set() else "disk"

    def count(self, layer: int, experts: Sequence[int]) -> dict[Key, Tier]:
        """Count a request for each of ``experts`` and say where each is."""
        tiers = {(layer, expert): self.tier_of((layer, expert)) for expert in experts}
        for tier in tiers.values():
            self.counters.by_tier[tier] += 1
        return tiers

    def serve(self, layers: Sequence[int], chosen: Sequence[Sequence[int]], late: int) -> None:
        """One token's ``chosen`` experts of each of ``layers``, all in host slots by now, were computed by
        whoever the listener told of them; ``late`` of them had to be waited for."""
        counters, count = self.counters, sum(len(experts) for experts in chosen)
        counters.by_tier["ram"] += count - late
        counters.by_tier["disk"] += late
        same = self.store.expert_nbytes
        if same is not None:
            counters.used_bytes["ram"] += count * same
            if self.holds_all:
                return
        for layer, experts in zip(layers, chosen, strict=True):
            for expert in experts:
                self.host_policy.touch((layer, expert))
                if same is None:
                    counters.used_bytes["ram"] += self.store.record(layer, expert).nbytes

    def listen(self, listener: Listener) -> None:
        """Tell ``listener`` of every expert, those that are there first, in place of whoever listened
        before."""
        self.wait()
        self.listener = listener
        for key, slot in self.host.slot_of.items():
            listener.coming(key, self._view("ram", slot, key))
            listener.landed(key, True)
        for key, weights in self._lent.items():
            listener.coming(key, weights)
            listener.landed(key, True)

    def reap(self) -> None:
        """Take note of reads that have finished. Raises CheckpointError if one failed."""
        for key in [key for key, request in self._pending.items() if request.done.is_set()]:
            self._land(key)

    def stream(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, ExpertWeights]]:
        """Yield each of ``experts`` with its weights, residents first, the others as their bytes arrive.

        A yielded weight is valid until the next one is asked for. Raises CheckpointError if the disk fails.
        """
        tiers = self.count(layer, experts)
        ordered = sorted(tiers, key=lambda key: {"vram": 0, "ram": 1, "disk": 2}[tiers[key]])
        window = self._window()
        locked: set[Key] = set()
        waiting = ordered[:]
        for index, key in enumerate(ordered):
            # Keep reads in flight for the next few, locked so that they do not evict one another.
            locked = set(ordered[index : index + window])
            while waiting and waiting[0] in locked:
                self._request(waiting.pop(0), Priority.DEMAND, locked)
            yield key[1], self._weights(key, locked)
            self.host_policy.touch(key)
            self.device_policy.touch(key)

    def demand(self, keys: Sequence[Key]) -> set[Key]:
        """Begin reading those of ``keys`` that are on disk, as many as may be in flight at once, and return
        those. Raises CheckpointError for one that could not be read."""
        first = set(keys[: self._window()])
        for key in keys[: len(first)]:
            pending = self._pending.get(key)
            if pending is not None and pending.error is not None:
                self._land(key)
            self._request(key, Priority.DEMAND, first)
        return first

    def prefetch(self, keys: Sequence[Key], protected: set[Key]) -> None:
        """Begin reading ``keys``, expected soon, if slots can be had that hold neither them nor
        ``protected``. Earlier guesses that are not among them any more and have not begun are dropped."""
        protected = protected | set(keys)
        for key, request in list(self._pending.items()):
            if request.priority is Priority.PREFETCH and key not in protected and self.reader.cancel(request):
                del self._pending[key]
                self._forget(key)
                self.counters.fetched["disk"] -= request.nbytes
        for key in keys:
            if key in self.host or key in self.device or key in self._lent:
                continue
            if not self.host.free and len(protected | self._busy()) >= len(self.host.slot_of):
                return
            self._request(key, Priority.PREFETCH, protected)

    def fill(self) -> None:
        """Begin reading experts into every free host slot, in disk order, behind whatever is demanded."""
        for key in self.store.experts():
            if not self.host.free:
                return
            if key not in self.host and key not in self.device:
                self._request(key, Priority.FILL, {key})

    def _pin(self, keys: Sequence[Key]) -> None:
        for key in keys:
            self._request(key, Priority.DEMAND, {key})
            self._land(key)
            slot = self.host.slot_of[key]
            self._upload(key, set())
            self.host.release(key)
            self._draining[slot] = self._tickets[key]

    def wait(self) -> None:
        """Wait for every read under way. Raises CheckpointError if one failed."""
        for key in list(self._pending):
            self._land(key)

    def _window(self) -> int:
        """How many experts of one layer may be in flight at once."""
        return max(1, min(_IN_FLIGHT, self.arena.slots - 1))

    def _busy(self) -> set[Key]:
        return {key for key, request in self._pending.items() if not request.done.is_set()}

    def _host_slot(self, key: Key, locked: set[Key]) -> int:
        """A host slot for ``key``: a free one, an idle expert's, or that of a read that has not begun."""
        if not self.host.free:
            busy = self._busy()
            if len(busy | (locked & self.host.slot_of.keys())) < len(self.host.slot_of):
                evicted = self.host_policy.victim(self.host.slot_of, locked | busy)
            else:
                evicted = self._reclaim(busy - locked)
            self._pending.pop(evicted, None)
            self._forget(evicted)
            ticket = self._tickets.get(evicted)
            if ticket is not None:  # its copy to the device may still be reading the slot
                self.transfer.done(ticket)
        slot = self.host.take(key)
        draining = self._draining.pop(slot, None)
        if draining is not None:
            self.transfer.done(draining)
        return slot

    def _forget(self, key: Key) -> None:
        self.host.release(key)
        if self.listener is not None:
            self.listener.evicted(key)

    def _reclaim(self, busy: set[Key]) -> Key:
        """An expert whose slot is being filled for later, its read dropped or awaited."""
        for key in busy:
            if self.reader.cancel(self._pending[key]):
                return key
        key = next(iter(busy))
        self._pending[key].done.wait()
        return key

    def _request(self, key: Key, priority: Priority, locked: set[Key]) -> None:
        """Make sure that ``key`` is resident in some tier or on its way to the host."""
        if key in self.device:
            return
        if key in self.host:
            pending = self._pending.get(key)
            if pending is not None:
                self.reader.promote(pending, priority)
            return
        if priority is not Priority.FILL and (key in self._lent or self._lend(key)):
            return
        slot = self._host_slot(key, locked)
        record, listener = self.store.record(*key), self.listener
        then: Callable[[bool], None] | None = None
        if key in self._lent:
            then = partial(self._copied, record)
        elif listener is not None:
            listener.coming(key, self._view("ram", slot, key))
            then = partial(listener.landed, key)
        self._pending[key] = self.reader.submit(record, self.arena.buffer(slot), priority, key[0], then)
        self.counters.fetched["disk"] += record.nbytes

    def _lend(self, key: Key) -> bool:
        """Use ``key`` from the page cache for now, if it is there and has no slot yet."""
        record = self.store.record(*key)
        image = self.loans.lend(record) if self.loans is not None else None
        if image is None:
            return False
        self._lent[key] = record.view(image)
        if self.listener is not None:
            self.listener.coming(key, self._lent[key])
            self.listener.landed(key, True)
        return True

    def _copied(self, record: ExpertRecord, whole: bool) -> None:
        """Called by a reading thread when a lent expert is in its slot, too."""
        if whole and self.loans is not None:
            self.loans.returned(record)

    def _move(self, key: Key) -> None:
        """``key`` was lent and is in its slot now: use it there."""
        del self._lent[key]
        if self.listener is not None:
            self.listener.coming(key, self._view("ram", self.host.slot_of[key], key))
            self.listener.landed(key, True)
        if self.loans is not None and not self._lent:
            self.loans.close()
            self.loans = None

    def _weights(self, key: Key, locked: set[Key]) -> ExpertWeights:
        record = self.store.record(*key)
        if key not in self.device and self.device_memory is None:
            self._request(key, Priority.DEMAND, locked)
            if key in self._lent:
                self.counters.used_bytes["ram"] += record.nbytes
                return self._lent[key]
        if key not in self.device:
            self._request(key, Priority.DEMAND, locked)
            self._land(key)
            if self.device_memory is None:
                self.counters.used_bytes["ram"] += record.nbytes
                return self._view("ram", self.host.slot_of[key], key)
            self._upload(key, locked)
        if key in self._tickets:
            self.transfer.landed(self._tickets[key])
        self.counters.used_bytes["vram"] += record.nbytes
        return self._view("vram", self.device.slot_of[key], key)

    def _land(self, key: Key) -> None:
        request = self._pending.get(key)
        if request is None:
            return
        try:
            request.wait()
        except CheckpointError:
            self._forget(key)
            self._pending.pop(key)
            self._lent.pop(key, None)
            raise
        self._pending.pop(key)
        if key in self._lent:
            self._move(key)

    def _upload(self, key: Key, locked: set[Key]) -> None:
        """Copy ``key`` from its host slot to a device slot."""
        assert self.device_memory is not None
        if not self.device.free:
            evicted = self.device_policy.victim(self.device.slot_of, locked | self.pinned)
            self.device.release(evicted)
            self._tickets.pop(evicted, None)
        slot = self.device.take(key)
        record = self.store.record(*key)
        source = self.arena.slot(self.host.slot_of[key])[: record.slot_bytes]
        self._tickets[key] = self.transfer.copy(source, self.device_memory[slot])
        self.counters.fetched["pcie"] += record.nbytes

    def _view(self, tier: Tier, slot: int, key: Key) -> ExpertWeights:
        record = self.store.record(*key)
        view_key = (tier, slot, record.layout)
        if view_key not in self._views:
            memory = self.arena.slot(slot) if tier == "ram" else self._device_slot(slot)
            self._views[view_key] = record.view(memory)
        return self._views[view_key]

    def _device_slot(self, slot: int) -> torch.Tensor:
        assert self.device_memory is not None
        return self.device_memory[slot]

    def tiers(self) -> dict[Key, Tier]:
        """The tier of every expert, for the report's heat map."""
        return {key: self.tier_of(key) for key in self.store.experts()}
