"""ExpertCache: experts in host slots, read from disk, kept and evicted. ``tiered_cache.py`` adds a device.

Weights are immutable, so eviction is forgetting: nothing is ever written back. All state is changed by one
thread at a time, the one that runs the model; reading threads only fill buffers.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from offload.experts.cache.watcher import Watcher
from offload.experts.storage.arena import Arena
from offload.experts.storage.reader import Priority, Reader, ReadRequest
from offload.experts.storage.slot_table import SlotTable
from offload.experts.storage.store import ExpertStore, ExpertWeights, Layout
from offload.experts.storage.transfer import Transfer
from offload.routing.eviction import Policy
from offload.routing.frequency import ExpertFrequency
from offload.tiers import Key, Tier
from quant.errors import CheckpointError

_IN_FLIGHT = 8


@dataclass
class Counters:
    """What was counted since the last ``take_counters``: requests by the tier that held the expert, bytes fetched
    by where from, and bytes of experts that were computed by where they lay."""

    by_tier: dict[Tier, int] = field(default_factory=lambda: {"vram": 0, "ram": 0, "disk": 0})
    fetched: dict[Literal["disk", "pcie"], int] = field(default_factory=lambda: {"disk": 0, "pcie": 0})
    used_bytes: dict[Tier, int] = field(default_factory=lambda: {"vram": 0, "ram": 0, "disk": 0})


class ExpertCache:
    """Serves the experts of ``store`` from ``ram_slots`` host slots, where ``reader`` brings them from disk.

    There are at least two slots unless every expert has one; experts that differ in size take ``ram_bytes`` together.
    ``frequency`` says which are worth a free slot (None: nothing is known), ``policy`` which to forget where none is
    free. With ``transfer`` its device can read the slots.
    """

    def __init__(
        self,
        store: ExpertStore,
        reader: Reader,
        policy: Policy,
        *,
        ram_slots: int,
        ram_bytes: int | None = None,
        frequency: ExpertFrequency | None = None,
        transfer: Transfer | None = None,
    ) -> None:
        self.store, self.reader, self.frequency = store, reader, frequency
        self.arena = Arena(ram_slots, store.slot_bytes, transfer, limit=ram_bytes)
        self.host = SlotTable(ram_slots, ram_bytes, lambda key: self.arena.taken(store.record(*key).slot_bytes))
        self.policy = policy
        self._holds_all = len(list(self.host.fitting(store.experts()))) == store.count
        self.counters = Counters()
        self.requests: dict[int, Counter[Tier]] = {layer: Counter() for layer in store.shape.moe_layers}
        self._pending: dict[Key, ReadRequest] = {}
        self._views: dict[tuple[int, Layout], ExpertWeights] = {}
        self.watcher: Watcher | None = None

    def check_files(self) -> None:
        """After a step: raise CheckpointError if a file changed that experts were used from in place."""

    def take_counters(self) -> Counters:
        """The counts since the last call."""
        counters, self.counters = self.counters, Counters()
        return counters

    @property
    def notes(self) -> list[str]:
        """What a user should know of the memory that there is for experts."""
        return self.arena.notes

    @property
    def holds_all(self) -> bool:
        """Whether every expert has a slot of its own."""
        return self._holds_all

    def tier_of(self, key: Key) -> Tier:
        """Where ``key`` is now; an expert still on its way counts as on disk."""
        if key not in self.host:
            return "disk"
        pending = self._pending.get(key)
        return "ram" if pending is None or pending.done.is_set() else "disk"

    def whole(self, key: Key) -> bool:
        """Whether ``key``'s bytes are known to be all in a host slot; see ``reap``."""
        return key in self.host and key not in self._pending

    def reading(self, key: Key) -> bool:
        """Whether ``key`` is on its way from disk to a host slot."""
        return key in self._pending

    def on_device(self, key: Key) -> bool:
        """Whether ``key`` needs no host slot, because a device holds it."""
        return False

    def in_use(self) -> set[Key]:
        """Experts whose host slots are being read by a device and may not be overwritten now."""
        return set()

    def wait_for_slot(self) -> bool:
        """Wait until one of the experts in use is so no more; False if there is none to wait for."""
        return False

    def host_changed(self, key: Key) -> None:
        """``key``'s bytes are all in its host slot now, or it has none any more."""

    def rebalance(self) -> None:
        """Between two steps: move experts to the tiers where they are wanted, as far as that needs no waiting."""

    def shrink_vram(self) -> int:
        """Give device memory back to the driver; returns its bytes, 0 if there is none to spare."""
        return 0

    def close(self) -> None:
        """End what others, a device above all, have to do with the memory."""

    def tally(self, layer: int, tier: Tier, count: int = 1) -> None:
        """Note ``count`` requests for experts of ``layer`` that ``tier`` held."""
        self.counters.by_tier[tier] += count
        self.requests[layer][tier] += count

    def count(self, layer: int, experts: Sequence[int]) -> dict[Key, Tier]:
        """Count a request for each of ``experts`` and say where each is."""
        tiers = {(layer, expert): self.tier_of((layer, expert)) for expert in experts}
        for tier in tiers.values():
            self.tally(layer, tier)
        return tiers

    def count_served(self, layers: Sequence[int], chosen: Sequence[Sequence[int]], late: Sequence[int]) -> None:
        """Count the ``chosen`` experts of each layer, computed from host slots; of those ``late`` had to come."""
        counters, count = self.counters, sum(len(experts) for experts in chosen)
        for layer, experts, waited in zip(layers, chosen, late, strict=True):
            self.requests[layer].update(ram=len(experts) - waited, disk=waited)
        counters.by_tier["ram"] += count - sum(late)
        counters.by_tier["disk"] += sum(late)
        same = self.store.expert_nbytes
        if same is not None:
            counters.used_bytes["ram"] += count * same
            if self.holds_all:
                return
        for layer, experts in zip(layers, chosen, strict=True):
            for expert in experts:
                self.policy.touch((layer, expert))
                if same is None:
                    counters.used_bytes["ram"] += self.store.record(layer, expert).nbytes

    def watch(self, watcher: Watcher) -> None:
        """Tell ``watcher`` of every expert in a host slot, and from now on of each that comes and goes, in place of
        an earlier watcher. Waits for the reads under way."""
        self.wait()
        self.watcher = watcher
        for key in self.host.slot_of:
            self._tell(key, self._view(key))

    def reap(self) -> None:
        """Note which reads have finished. Raises CheckpointError if one failed."""
        for key in [key for key, request in self._pending.items() if request.done.is_set()]:
            self._land(key)

    def stream(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, ExpertWeights]]:
        """Yield each of ``experts`` with its weights, residents first, the others as their bytes arrive. A yielded
        weight is valid until the next one is asked for. Raises CheckpointError if the disk fails."""
        tiers = self.count(layer, experts)
        yield from self.serve_from_host(sorted(tiers, key=lambda key: tiers[key] == "disk"))

    def stream_in_order(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, ExpertWeights]]:
        """As ``stream``, by their numbers: what adds them up gets the same to the bit whatever was resident."""
        yield from self.serve_from_host(sorted(self.count(layer, experts)), keep=True)

    def serve_from_host(self, ordered: Sequence[Key], keep: bool = False) -> Iterator[tuple[int, ExpertWeights]]:
        """Yield each of ``ordered`` from its host slot, fetched where it has none; with ``keep``, as far as there is
        room, those that have one keep it until their turn. See ``stream``."""
        window, waiting = self.window(), list(ordered)
        for index, key in enumerate(ordered):
            # Keep reads in flight for the next few, locked so that they do not evict one another.
            locked = self._kept(ordered[index:]) if keep else set(ordered[index : index + window])
            while waiting and waiting[0] in locked and (waiting[0] == key or self._has_slot(waiting[0], locked)):
                self._request(waiting.pop(0), Priority.DEMAND, locked)
            yield key[1], self._weights(key, locked)
            self.policy.touch(key)

    def _kept(self, keys: Sequence[Key]) -> set[Key]:
        """The first of ``keys``, those that are read next, and as many residents as leave a slot for these."""
        there = [key for key in keys if key in self.host and key not in self._pending]
        first = {keys[0], *[key for key in keys if key not in there][: self.window()]}
        return first | set(there[: max(0, self.arena.whole - 1 - len(first))])

    def demand(self, keys: Sequence[Key], keep: Sequence[Key] = ()) -> set[Key]:
        """Begin reading those of ``keys`` on disk, as many as may be in flight at once, in other slots than ``keep``'s
        if there are any; returns what is not to be evicted. Raises CheckpointError for one that could not be read."""
        first = set(keys[: self.window()])
        locked = first | set(keep[: max(0, self.arena.whole - 1 - len(first))])
        for key in keys[: len(first)]:
            if (pending := self._pending.get(key)) is not None and pending.error is not None:
                self._land(key)
            self._request(key, Priority.DEMAND, locked)
        return locked

    def prefetch(self, keys: Sequence[Key], protected: set[Key], priority: Priority = Priority.PREFETCH) -> None:
        """Begin reading ``keys``, expected soon, if slots can be had that hold neither them nor
        ``protected``. Earlier guesses of this ``priority`` that are not among them any more and have not
        begun are dropped."""
        protected = protected | set(keys)
        for key, request in list(self._pending.items()):
            if request.priority is priority and key not in protected:
                self._cancel(key)
        for key in keys:
            if key in self.host or self.on_device(key):
                if key in self._pending:
                    self.reader.promote(self._pending[key], priority)
                continue
            if not self.host.has_room(key, self.host.slot_of.keys() - self._taken(protected)):
                return
            self._request(key, priority, protected)

    def fill(self) -> None:
        """Begin reading experts into every free host slot, in disk order and behind whatever is demanded: the
        most frequent of those that are nowhere yet or, where nothing is known, the first on disk."""
        absent = [key for key in self.store.experts() if key not in self.host and not self.on_device(key)]
        ranked = absent if self.frequency is None else self.frequency.ordered(absent)
        chosen = set(self.host.fitting(ranked))
        for key in absent:
            if key in chosen:
                self._request(key, Priority.FILL, {key})

    def wait(self) -> None:
        """Wait for every read under way. Raises CheckpointError if one failed."""
        for key in list(self._pending):
            self._land(key)

    def window(self) -> int:
        """How many experts of one layer may be in flight at once."""
        return max(1, min(_IN_FLIGHT, self.arena.whole - 1))

    def _busy(self) -> set[Key]:
        return {key for key, request in self._pending.items() if not request.done.is_set()}

    def _has_slot(self, key: Key, locked: set[Key]) -> bool:
        """Whether ``key`` can have a slot that none of ``locked`` has and no device reads."""
        held = self.host.slot_of.keys()
        return self.host.has_room(key, held - (held & (locked | self.in_use())))

    def _taken(self, locked: set[Key]) -> set[Key]:
        """Experts whose slots may not be given to another."""
        return self._busy() | ((locked | self.in_use()) & self.host.slot_of.keys())

    def _host_slot(self, key: Key, locked: set[Key]) -> int:
        """A host slot for ``key``: a free one, an idle expert's, or one that is being filled for later."""
        while not self.host.has_room(key):
            reading = self._busy()  # asked once: a read may end at any time
            taken = reading | self._taken(locked)
            if len(taken) < len(self.host.slot_of):
                self.release(self.policy.victim(self.host.slot_of, taken))
            elif reading - locked:
                self._give_up(reading - locked)
            else:
                waited = self.wait_for_slot()
                assert waited, "every host slot is in use at once"
        return self.host.take(key)

    def release(self, key: Key) -> None:
        """Forget ``key``'s host slot, whose read is over."""
        landed = self._pending.pop(key, None) is None
        self._free(key)
        if landed:
            self.host_changed(key)

    def _free(self, key: Key) -> None:
        self.host.release(key)
        if self.watcher is not None:
            self.watcher.evicted(key)

    def _cancel(self, key: Key) -> bool:
        """Drop the read of ``key`` and its slot; False if that has begun."""
        request = self._pending[key]
        if not self.reader.cancel(request):
            return False
        del self._pending[key]
        self._free(key)
        self.counters.fetched["disk"] -= request.nbytes
        return True

    def _give_up(self, reading: set[Key]) -> None:
        """Free the slot of one of ``reading``: of a read that has not begun, or of one that is awaited."""
        if not any(self._cancel(key) for key in reading):
            key = next(iter(reading))
            self._pending[key].done.wait()
            self.release(key)

    def _request(self, key: Key, priority: Priority, locked: set[Key]) -> None:
        """Make sure that ``key`` is resident in some tier or on its way to the host."""
        if self.on_device(key):
            return
        if key in self.host:
            pending = self._pending.get(key)
            if pending is not None:
                self.reader.promote(pending, priority)
            return
        slot, record = self._host_slot(key, locked), self.store.record(*key)
        self.arena.trim(slot, record.slot_bytes)
        then = self._announce(key)
        self._pending[key] = self.reader.submit(record, self.arena.buffer(slot), priority, key[0], then)
        self.counters.fetched["disk"] += record.nbytes

    def _tell(self, key: Key, weights: ExpertWeights) -> None:
        """Say that ``key``'s bytes are all there."""
        if self.watcher is not None:
            self.watcher.coming(key, weights)
            self.watcher.arrived(key, True)

    def _announce(self, key: Key) -> Callable[[bool], None] | None:
        """Say that ``key`` is coming; returns what a reading thread is to call once it is there."""
        if self.watcher is None:
            return None
        self.watcher.coming(key, self._view(key))
        return partial(self.watcher.arrived, key)

    def _weights(self, key: Key, locked: set[Key]) -> ExpertWeights:
        self._request(key, Priority.DEMAND, locked)
        self._land(key)
        self.counters.used_bytes["ram"] += self.store.record(*key).nbytes
        return self._view(key)

    def _land(self, key: Key) -> None:
        request = self._pending.get(key)
        if request is None:
            return
        try:
            request.wait()
        except CheckpointError:
            self._free(key)
            del self._pending[key]
            raise
        del self._pending[key]
        self.host_changed(key)

    def _view(self, key: Key) -> ExpertWeights:
        record, slot = self.store.record(*key), self.host.slot_of[key]
        view_key = (slot, record.layout)
        if view_key not in self._views:
            self._views[view_key] = record.view(self.arena.slot(slot))
        return self._views[view_key]
