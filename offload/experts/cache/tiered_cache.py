"""TieredCache: experts over disk, RAM and a device; the hottest on the device, and none twice for good.

What is resident on the device has no host copy, and nothing is ever written back: what leaves the device is
read from disk again, or forgotten. While a step runs whose kernels find experts by the device's table, no host
slot changes that they could still read.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from offload.experts.cache.address_table import PINNED, VRAM, Places
from offload.experts.cache.device_tier import DeviceTier
from offload.experts.cache.expert_cache import ExpertCache
from offload.experts.cache.promotion import Promotion
from offload.experts.cache.regain import Regain
from offload.experts.cache.staging_slots import StagingSlots
from offload.experts.storage.reader import Priority, Reader
from offload.experts.storage.store import ExpertStore, ExpertWeights
from offload.experts.storage.transfer import Transfer
from offload.routing.eviction import Policy
from offload.routing.frequency import ExpertFrequency, Ids
from offload.tiers import Key, Tier
from quant.sizes import format_size


class TieredCache(ExpertCache):
    """Serves experts from ``vram_slots`` device slots, ``ram_slots`` host slots or disk; see ``ExpertCache``.

    ``frequency``, to which it adds what is asked for, decides what the device holds, ``policy`` what the host
    forgets. ``seeds`` are copied to the device before this returns, as many as have room. ``regain``: take
    device memory again that went to other programs, once they leave it (unproven).

    ``host_addresses`` int64 ``[rows, experts]`` are where the CPU's kernels find experts in host memory while
    a step runs, 0 where they do not.
    """

    frequency: ExpertFrequency

    def __init__(
        self,
        store: ExpertStore,
        reader: Reader,
        policy: Policy,
        *,
        ram_slots: int,
        vram_slots: int,
        transfer: Transfer,
        frequency: ExpertFrequency,
        seeds: Sequence[Key] = (),
        regain: bool = False,
    ) -> None:
        layers, experts = store.shape.moe_layers, store.shape.num_experts
        super().__init__(store, reader, policy, ram_slots=ram_slots, frequency=frequency, transfer=transfer)
        self.vram = DeviceTier(transfer, store, vram_slots, self, frequency)
        self.promotion = Promotion(self.vram, self)
        self.staging = StagingSlots(self.vram, self)
        self.regain = Regain(self.vram) if regain else None
        self.host_addresses = torch.zeros(len(layers), experts, dtype=torch.int64)
        self._host_addresses = self.host_addresses.numpy()  # the same memory: see AddressTable
        self._nbytes = np.array([[store.record(layer, e).nbytes for e in range(experts)] for layer in layers])
        self._step: int | None = None  # the row that the running step may have reached
        self._fetched: dict[Key, Tier] = {}  # what the running step asked of the host, and where it was
        # Where the device found experts in the step that ended last, and what that asked of the host.
        self._ended: tuple[Places, dict[Key, Tier]] = self.vram.address_table.posted_places, {}
        self._fills = False
        self._shrunk = ""  # what has become of memory that was given back
        self._seed(seeds)
        self.vram.address_table.flush()

    def _seed(self, seeds: Sequence[Key]) -> None:
        """Copy ``seeds`` to the device, as many as have room, and wait for them. Raises CheckpointError if
        the disk fails."""
        wanted = list(seeds[: self.vram.slots.count - self.vram.reserve])
        for index, key in enumerate(wanted):
            ahead = wanted[index : index + self.window()]
            for later in ahead[1:]:
                self.demand_source(later, set(ahead), wait=False)
            self.demand_source(key, set(ahead), wait=True)
            self.vram.load(key)
            self.vram.land()
        while self.vram.arriving:
            self.wait_for_slot()

    @property
    def notes(self) -> list[str]:
        """What a user should know of the memory that there is for experts."""
        slots = self.vram.slots
        shrunk = (
            "the GPU ran out of memory, within --vram or beside another program: expert slots were given back; "
            f"{slots.count} ({format_size(slots.nbytes)}) are there now, {self._shrunk}"
        )
        return [*self.arena.notes, *slots.notes, *([shrunk] if self._shrunk else [])]

    @property
    def holds_all(self) -> bool:
        """Whether every expert has a slot of its own."""
        return self.arena.slots + self.vram.slots.count - self.vram.reserve >= self.store.count

    def tier_of(self, key: Key) -> Tier:
        """Where ``key`` is now; an expert still on its way counts as where it comes from."""
        return "vram" if self.vram.resident(key) else super().tier_of(key)

    def on_device(self, key: Key) -> bool:
        """Whether ``key`` needs no host slot beside its device slot."""
        return key in self.vram and key not in self.vram.leaving

    def stream(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, ExpertWeights]]:
        """Yield each of ``experts`` with its weights on the device; see ``ExpertCache.stream``."""
        for batch in self.batches(layer, np.asarray(experts)):
            yield from ((expert, self.vram.weights(slot, (layer, expert))) for expert, slot in batch.items())

    def batches(
        self, layer: int, chosen: Ids, ahead: Sequence[Key] = (), *, tokens: int = 1
    ) -> Iterator[dict[int, int]]:
        """Yield the experts that ``tokens`` tokens have ``chosen``, each with its device slot: residents at once,
        the others as they land in staging slots. Compute waits for them by event, the host only for the disk.

        A batch is valid until the next is asked for. ``ahead`` are experts of the next layer that are copied
        once this one's are, as far as there are slots: they make this a prompt's large chunk, for which the
        device has more staging slots. Raises CheckpointError if the disk fails.
        """
        if self._step is not None:  # it was interrupted, and may still be running
            self.vram.transfer.drain()
            self._step = None
        experts: list[int] = np.unique(chosen).tolist()
        if not all((layer, expert) in self.vram for expert in experts) or self.vram.reserve:
            self.staging.open(large=bool(ahead))
        tiers = self.count(layer, experts)
        self.frequency.count(layer, chosen.ravel(), tokens)
        for key, tier in tiers.items():
            self.counters.used_bytes["vram"] += self.store.record(*key).nbytes
            if tier != "vram":
                self.policy.touch(key)
        return self.staging.batches(list(tiers), ahead)

    def begin_token(self) -> None:
        """Before a step whose kernels read the address table, the last step being over: move experts, and post the
        table in the compute queue. Until ``end_token``, nothing is overwritten that it points at."""
        self._step = None
        self._move()
        self._keep_a_slot_unseen()
        self.vram.address_table.flush()
        self._fetched = {}
        self._step = 0

    def end_token(self) -> None:
        """The step is over. ``after_token`` counts it, beside the next step if need be."""
        self._ended = self.vram.address_table.posted_places.copy(), self._fetched
        self.drop_token()

    def drop_token(self) -> None:
        """The step is over, and what it asked for is not counted."""
        self._step, self._fetched = None, {}

    def fetch(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, ExpertWeights]]:
        """In a step that has reached ``layer``: yield ``experts``, which its kernels do not find on the device, from
        host slots, first those that have one and then the others as they arrive from disk.

        Raises CheckpointError if the disk fails.
        """
        self._step = self.vram.address_table.row(layer)
        tiers = {(layer, expert): self.tier_of((layer, expert)) for expert in experts}
        self._fetched |= tiers
        # Those that have a slot first: once they are used, it may be the only one that can be had.
        yield from self.serve_from_host(sorted(tiers, key=lambda key: key not in self.host))

    def after_token(self, chosen: Ids) -> None:
        """Count the step that ended last, which used ``chosen`` ``[rows, ..., k]`` (negative for none), and plan what
        to move. Nothing is moved here: another step may be running by now."""
        ids = chosen.reshape(len(chosen), -1)
        self.frequency.count_step(ids, max(1, ids.shape[1] // self.store.shape.top_k))
        self._count_used(ids)
        self.promotion.plan()

    def rebalance(self) -> None:
        """Between two steps: take note of copies that have landed, begin one at most, refill RAM."""
        if self._step is not None:
            return
        self.promotion.plan()
        self._move()
        self.vram.address_table.flush()

    def _move(self) -> None:
        """Go on with what is under way, begin what is planned, refill RAM. No step may be running."""
        self.staging.close()
        self.reap()
        if self.regain is not None and self.regain.look():
            self._shrunk = "some were taken again when there was room, and fill as experts are asked for"
        self.promotion.step()
        if self._fills and self.host.free:
            self.fill()

    def shrink_vram(self) -> int:
        """Give the segment of device memory with the coldest experts back to the driver; returns its bytes, 0 if no
        more can be spared. Its experts are read from disk when they are asked for."""
        segment, transfer = self.vram.coldest_segment(), self.vram.transfer
        if segment is None:
            return 0
        free, allowed = transfer.memory_left()
        transfer.drain()
        self.staging.close()
        self.vram.land()
        nbytes = self.vram.give_back(segment)
        if self.regain is not None:
            self.regain.lost(segment, to_others=free < allowed)
        self._shrunk = "and the other experts run from RAM or disk"
        return nbytes

    def close(self) -> None:
        """Wait for the device and unpin host memory."""
        try:
            self.vram.transfer.drain()
        except RuntimeError:  # the GPU is gone, as an earlier error has said, and its pins with it
            return
        self.arena.unpin()

    def in_use(self) -> set[Key]:
        """Experts whose host slots a copy or the running step may be reading."""
        found, table = self.vram.sources(), self.vram.address_table
        if self._step is not None:
            coming = [(table.row(layer), (layer, expert)) for layer, expert in self.host.slot_of]
            posted = table.posted_places
            found |= {key for row, key in coming if row >= self._step and posted[row, key[1]] == PINNED}
        return found

    def wait_for_slot(self) -> bool:
        """Wait until a copy has read its host slot; False if there is none to wait for."""
        return self.vram.wait_for_source(land=self._step is None)

    def host_changed(self, key: Key) -> None:
        """``key`` has come to its host slot, where the device may read it, too, or has left it."""
        address = 0
        if self.whole(key):
            address = self.arena.slot(self.host.slot_of[key]).data_ptr() + self.store.record(*key).start
        self._set_host_address(key, address)
        self.vram.host_changed(key)

    def _set_host_address(self, key: Key, address: int) -> None:
        self._host_addresses[self.vram.address_table.row(key[0]), key[1]] = address

    def device_address(self, key: Key) -> int:
        """See ``HostSource``."""
        address = self.arena.device_address(self.host.slot_of[key]) if self.whole(key) else 0
        return address and address + self.store.record(*key).start

    def read_behind(self, key: Key, *, evict: bool) -> None:
        """See ``HostSource``."""
        if key not in self.host and (self.host.free or (evict and self._has_slot(key, {key}))):
            self._request(key, Priority.FILL, {key})

    def demand_source(self, key: Key, locked: set[Key], *, wait: bool) -> bool:
        """See ``HostSource``."""
        if key not in self.host and (wait or self._has_slot(key, locked)):
            self._request(key, Priority.DEMAND, {key} if wait else locked)
        if wait or (key in self._pending and self._pending[key].done.is_set()):
            self._land(key)
        return self.whole(key)

    def source(self, key: Key) -> Tensor:
        """See ``HostSource``."""
        record = self.store.record(*key)
        self.counters.fetched["pcie"] += record.nbytes
        return self.arena.slot(self.host.slot_of[key])[: record.slot_bytes]

    def _all_in_memory(self) -> bool:
        """Whether every expert has a slot, of whichever tier."""
        twice = sum(key in self.host for key in (*self.vram.arriving, *self.vram.leaving))
        return len(self.host.slot_of) + len(self.vram.slot_table.slot_of) - twice == self.store.count

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
        table = self.vram.address_table
        while not self.host.free:
            held = self.in_use()
            seen = table.noted_places == PINNED
            held_unseen = sum(key in self.host and not seen[table.row(key[0]), key[1]] for key in held)
            if np.count_nonzero(seen) + held_unseen < len(self.host.slot_of):
                return
            coldest = self.frequency.coldest(seen & ~table.mask(held))
            if coldest is not None:
                table.clear(coldest)
                self._set_host_address(coldest, 0)
                return
            waited = self.wait_for_slot()
            assert waited, "every host slot is being copied"

    def _count_used(self, ids: Ids) -> None:
        """Count the requests of the step that ended last for ``ids`` ``[rows, n]``."""
        used = np.zeros(self._nbytes.shape, dtype=bool)
        rows, columns = np.nonzero(ids >= 0)
        used[rows, ids[rows, columns]] = True
        places, fetched = self._ended
        near = used & (places == VRAM)
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
                self.policy.touch(key)
