"""TieredCache: experts over disk, RAM and a device; the hottest on the device, and none twice for good.

What is resident on the device has no host copy, and nothing is ever written back: what leaves the device is
read from disk again (``swaps.py``), or forgotten. While a step runs that reads the device tables, no host
slot changes that it could still read.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from offload.experts.cache.address_table import PINNED, VRAM, AddressTable
from offload.experts.cache.device_slots import DeviceCache
from offload.experts.cache.host_cache import ExpertCache
from offload.experts.cache.pressure import MemoryPressure
from offload.experts.cache.promotion import Promotion
from offload.experts.cache.staging import Batch, StagingSlots
from offload.experts.storage.reader import Priority, Reader
from offload.experts.storage.store import ExpertStore, ExpertWeights
from offload.experts.storage.transfer import Transfer
from offload.plan.placement import vram_reserve
from offload.routing.eviction import Policy
from offload.routing.frequency import ExpertFrequency, Ids
from offload.tiers import Key, Tier


@dataclass(frozen=True)
class _Over:
    """A step that has ended: where the device found experts, ``[rows, experts]``, and what it asked of the
    host, with the tier that held it."""

    places: npt.NDArray[np.uint8]
    fetched: dict[Key, Tier]


class TieredCache(ExpertCache):
    """Serves experts from ``vram_slots`` device slots, ``ram_slots`` host slots or disk.

    ``seeds`` are copied to the device before this returns, as many as have room. ``frequency`` decides what the
    device holds, ``policy`` what the host forgets. See ``ExpertCache``.

    ``host_addresses`` int64 ``[rows, experts]`` are where the CPU's kernels find experts in host memory while
    a step runs, 0 where they do not.
    """

    def __init__(
        self,
        store: ExpertStore,
        reader: Reader,
        policy: Callable[[], Policy],
        *,
        ram_slots: int,
        vram_slots: int,
        transfer: Transfer,
        frequency: ExpertFrequency | None = None,
        seeds: Sequence[Key] = (),
    ) -> None:
        shape = store.shape
        self.heat = frequency or ExpertFrequency(shape.moe_layers, shape.num_experts)
        super().__init__(store, reader, policy, ram_slots=ram_slots, frequency=self.heat, transfer=transfer)
        self.transfer = transfer
        self.tables = AddressTable(shape.moe_layers, shape.num_experts, transfer)
        self.vram = DeviceCache(transfer, store, vram_slots, least=min(vram_slots, 2, store.count))
        self.notes += self.vram.slots.notes
        self.reserve = self._reserve()
        self.staging = StagingSlots(self)
        self.swaps = Promotion(self)
        self.retreat = MemoryPressure(self)
        self.host_addresses = torch.zeros(len(shape.moe_layers), shape.num_experts, dtype=torch.int64)
        self._host_addresses = self.host_addresses.numpy()  # the same memory: see AddressTable
        self._copied_from: dict[Key, Any] = {}  # host slots that copies to lent slots read, with tickets
        self._step: int | None = None  # the row that the running step may have reached
        self._fetched: dict[Key, Tier] = {}  # what the running step asked of the host, and where it was
        self._over = _Over(self.tables.exposed_places(), {})
        self._fills = False
        self._nbytes = np.array(
            [[store.record(layer, e).nbytes for e in range(shape.num_experts)] for layer in shape.moe_layers]
        )
        self.swaps.seed(seeds)
        self.tables.flush()

    @property
    def holds_all(self) -> bool:
        """Whether every expert has a slot of its own."""
        return self.arena.slots + self.vram.slots.count - self.reserve >= self.store.count

    def tier_of(self, key: Key) -> Tier:
        """Where ``key`` is now; an expert still on its way counts as where it comes from."""
        return "vram" if self.vram.resident(key) else super().tier_of(key)

    def on_device(self, key: Key) -> bool:
        """Whether ``key`` needs no host slot beside its device slot."""
        return key in self.vram and key not in self.swaps.leaving

    def stream(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, ExpertWeights]]:
        """Yield each of ``experts`` with its weights on the device; see ``ExpertCache.stream``."""
        for batch in self.batches(layer, np.asarray(experts)):
            yield from batch.weights.items()

    def batches(self, layer: int, chosen: Ids, ahead: Sequence[Key] = (), *, tokens: int = 1) -> Iterator[Batch]:
        """Yield the weights of the experts that ``tokens`` tokens have ``chosen`` on the device, residents at
        once, the others as they land in lent slots; compute waits for them by event, the host only for the
        disk.

        A batch is valid until the next is asked for. ``ahead`` are experts of the next layer that are copied
        once this one's are, as far as there are slots: they make this a prompt's large chunk, for which the
        device lends more slots. Raises CheckpointError if the disk fails.
        """
        if self._step is not None:  # it was interrupted, and may still be running
            self.transfer.drain()
            self._step = None
        experts: list[int] = np.unique(chosen).tolist()
        if not all((layer, expert) in self.vram for expert in experts) or self.reserve:
            self.staging.borrow(large=bool(ahead))
        tiers = self.count(layer, experts)
        self.heat.count(layer, chosen.ravel(), tokens)
        for key, tier in tiers.items():
            self.counters.used_bytes["vram"] += self.store.record(*key).nbytes
            if tier != "vram":
                self.host_policy.touch(key)
        return self.staging.batches(list(tiers), ahead)

    def begin_token(self) -> None:
        """Before a step that reads the tables: move experts, and post the tables in the compute queue. Until
        ``end_token``, nothing is overwritten that they point at. The last step is over."""
        self._step = None
        self._move()
        self._keep_a_slot_unseen()
        self.tables.flush()
        self._fetched = {}
        self._step = 0

    def end_token(self) -> None:
        """The step is over; ``after_token`` counts it when there is time, beside the next step if need be."""
        self._over = _Over(self.tables.exposed_places().copy(), self._fetched)
        self.drop_token()

    def drop_token(self) -> None:
        """The step is over, and what it asked for is not counted."""
        self._step, self._fetched = None, {}

    def fetch(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, ExpertWeights]]:
        """In a step that has reached ``layer``: yield ``experts``, none of them on the device by its tables,
        from host slots, residents first and the others as they arrive from disk.

        Raises CheckpointError if the disk fails.
        """
        self._step = self.tables.row(layer)
        tiers = {(layer, expert): self.tier_of((layer, expert)) for expert in experts}
        self._fetched |= tiers
        # Those that have a slot first: once they are used, it may be the only one that can be had.
        yield from self.serve_from_host(sorted(tiers, key=lambda key: key not in self.host))

    def after_token(self, chosen: Ids) -> None:
        """``chosen`` ``[rows, ..., k]`` (negative for none) were used by the step that ended last. Counts it
        and plans what to move; nothing is moved here: another step may be running by now."""
        ids = chosen.reshape(len(chosen), -1)
        self.heat.count_step(ids, max(1, ids.shape[1] // self.store.shape.top_k))
        self._count_used(ids)
        self.swaps.plan()

    def rebalance(self) -> None:
        """Between two steps: take note of copies that have landed, begin at most SWAPS, refill RAM."""
        if self._step is not None:
            return
        self.swaps.plan()
        self._move()
        self.tables.flush()

    def _move(self) -> None:
        """Go on with what is under way, begin what is planned, refill RAM. No step may be running."""
        self.staging.close()
        self.reap()
        self.retreat.look()
        self.swaps.step()
        if self._fills and self.host.free:
            self.fill()

    def shrink_vram(self) -> int:
        """Give device memory back to the driver, the coldest part of it; returns its bytes, 0 if no more can
        be spared. What lay there is on disk until it is asked for."""
        return self.retreat.shrink()

    def resized(self) -> None:
        """The device has more or fewer slots than before."""
        self.reserve = self._reserve()
        self.tables.flush()

    def close(self) -> None:
        """Wait for the device and unpin host memory."""
        try:
            self.transfer.drain()
        except RuntimeError:  # the GPU is gone, which whoever worked with it has reported, and its pins too
            return
        self.arena.unpin()

    def in_use(self) -> set[Key]:
        """Experts whose host slots a copy or the running step may be reading."""
        self._copied_from = {key: ticket for key, ticket in self._copied_from.items() if not self.transfer.poll(ticket)}
        found = self._copied_from.keys() | self.vram.arriving.keys()
        if self._step is not None:
            row, exposed = self.tables.row, self.tables.exposed
            found |= {k for k in self.host.slot_of if exposed(k) == PINNED and row(k[0]) >= self._step}
        return found

    def wait_for_slot(self) -> bool:
        """Wait until a copy has read its host slot; False if there is none to wait for."""
        if self._copied_from:
            self.transfer.done(self._copied_from.pop(next(iter(self._copied_from))))
            return True
        if self.vram.arriving and self._step is None:
            self.transfer.done(next(iter(self.vram.arriving.values())))
            self.swaps.land()
            return True
        return False

    def reached_host(self, key: Key) -> None:
        """``key``'s bytes are all in its host slot, where the device may read them, too."""
        start = self.store.record(*key).start
        self._set_host_address(key, self.arena.slot(self.host.slot_of[key]).data_ptr() + start)
        if not self.vram.resident(key):
            self._place_on_host(key)

    def left_host(self, key: Key) -> None:
        """``key``, which was whole, has no host slot any more."""
        self._set_host_address(key, 0)
        if not self.vram.resident(key):
            self.tables.clear(key)

    def window(self) -> int:
        """How many experts may be on their way from disk at once."""
        return self._window()

    def reading(self, key: Key) -> bool:
        """Whether ``key`` is on its way to its host slot."""
        return key in self._pending

    def read_behind(self, key: Key) -> None:
        """Begin reading ``key`` behind everything else, if it has no host slot and one can be had."""
        if key not in self.host and self._has_slot({key}):
            self._request(key, Priority.FILL, {key})

    def wants_source(self, key: Key, locked: set[Key], *, wait: bool) -> bool:
        """Whether ``key`` lies whole in a host slot, its read begun if it does not and, with ``wait``,
        awaited. Raises CheckpointError if the disk fails."""
        if key not in self.host and (wait or self._has_slot(locked)):
            self._request(key, Priority.DEMAND, {key} if wait else locked)
        if wait or (key in self._pending and self._pending[key].done.is_set()):
            self._land(key)
        return key in self.host and key not in self._pending

    def copy_to_staging(self, key: Key, slot: int, after: Any) -> Any:
        """Begin copying ``key`` from its host slot to the lent ``slot``; returns the ticket."""
        record = self.store.record(*key)
        source = self.arena.slot(self.host.slot_of[key])[: record.slot_bytes]
        ticket = self._copied_from[key] = self.transfer.copy(source, self.vram.slots.view(slot), after)
        self.counters.fetched["pcie"] += record.nbytes
        return ticket

    def copy_to_device(self, key: Key) -> None:
        """Begin copying ``key`` from its host slot to a free slot of the device, to stay there."""
        record = self.store.record(*key)
        self.vram.arrive(key, self.arena.slot(self.host.slot_of[key])[: record.slot_bytes])
        self.counters.fetched["pcie"] += record.nbytes

    def drop_resident(self, key: Key) -> None:
        """Take ``key`` off the device; it is where else it is, if anywhere."""
        self.swaps.leaving.pop(key, None)
        self.vram.forget(key)
        self._place_on_host(key)

    def _reserve(self) -> int:
        return vram_reserve(self.vram.slots.count, self.store.count)

    def _all_in_memory(self) -> bool:
        """Whether every expert has a slot, of whichever tier."""
        twice = sum(key in self.host for key in (*self.vram.arriving, *self.swaps.leaving))
        return len(self.host.slot_of) + len(self.vram.table.slot_of) - twice == self.store.count

    def _set_host_address(self, key: Key, address: int) -> None:
        self._host_addresses[self.tables.row(key[0]), key[1]] = address

    def _place_on_host(self, key: Key) -> None:
        """Enter ``key`` in the tables as its host slot is."""
        whole = key in self.host and key not in self._pending
        address = self.arena.device_address(self.host.slot_of[key]) if whole else 0
        if address:
            self.tables.set(key, PINNED, address + self.store.record(*key).start)
        else:
            self.tables.clear(key)

    def fill(self) -> None:
        """See ``ExpertCache.fill``. From now on, slots that come free are filled again between steps."""
        self._fills = True
        if not self._all_in_memory():
            super().fill()

    def _keep_a_slot_unseen(self) -> None:
        """Hide the coldest host expert from the coming step's kernels, unless there is a host slot that the
        device does not see: what a step asks the disk for needs one that can be overwritten while it runs."""
        if self._all_in_memory():
            return
        while not self.host.free:
            held = self.in_use()
            seen = self.tables.where() == PINNED
            elsewhere = sum(key in self.host and self.tables.place(key) != PINNED for key in held)
            if np.count_nonzero(seen) + elsewhere < len(self.host.slot_of):
                return
            for key in held:
                seen[self.tables.row(key[0]), key[1]] = False
            coldest = self.heat.coldest(seen)
            if coldest is not None:
                self.tables.clear(coldest)
                self._set_host_address(coldest, 0)
                return
            assert self.wait_for_slot(), "every host slot is being copied"

    def _count_used(self, ids: Ids) -> None:
        """Count the requests of the step that ended last for ``ids`` ``[rows, n]``."""
        used = np.zeros(self._nbytes.shape, dtype=bool)
        rows, columns = np.nonzero(ids >= 0)
        used[rows, ids[rows, columns]] = True
        fetched, near = self._over.fetched, used & (self._over.places == VRAM)
        counters, layers = self.counters, self.store.shape.moe_layers
        for row, count in enumerate(near.sum(1).tolist()):
            self.tally(layers[row], "vram", count)
        counters.used_bytes["vram"] += int(self._nbytes[near].sum())
        for row, expert in np.argwhere(used & ~near).tolist():
            key = (layers[row], expert)
            tier = fetched.get(key, "ram")
            self.tally(layers[row], tier)
            if key not in fetched:  # what was fetched was counted then
                counters.used_bytes[tier] += int(self._nbytes[row, expert])
            if key in self.host:
                self.host_policy.touch(key)
