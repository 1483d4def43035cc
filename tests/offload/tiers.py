"""What tests of the tiers share: a small store whose bytes are known, and steps as a device takes them."""

import ctypes
from pathlib import Path

import numpy as np

from offload.experts.cache.address_table import ELSEWHERE, PINNED, VRAM
from offload.experts.cache.tiered_cache import TieredCache
from offload.experts.storage.reader import Reader
from offload.experts.storage.store import ExpertStore
from offload.experts.storage.transfer import Transfer
from offload.routing.eviction import LeastRecent
from offload.routing.frequency import ExpertFrequency
from offload.tiers import Key
from quant.checkpoint.checkpoint import Checkpoint
from tests.offload.lagging import LaggingTransfer

Choice = list[list[int]]  # per MoE layer, the experts that a token asks for


class Bench:
    """A store of 4 layers × 8 experts, and the bytes of each expert as they lie on disk."""

    def __init__(self, path: Path) -> None:
        self.store = ExpertStore(Checkpoint.open(path))
        self.layers, self.experts = self.store.shape.moe_layers, self.store.shape.num_experts
        self.reader = Reader([entry.file for entry in self.store.checkpoint.entries.values()])
        self.bytes = {key: self._stored(key) for key in self.store.experts()}

    def _stored(self, key: Key) -> bytes:
        record = self.store.record(*key)
        slot = bytearray(record.slot_bytes)
        for run in record.runs:
            with open(run.file, "rb") as file:
                file.seek(run.offset)
                found = file.read(run.needed)
            slot[run.position : run.position + len(found)] = found
        return bytes(slot[record.start : record.start + record.nbytes])

    def cache(self, transfer: Transfer, ram: int, vram: int, **more: object) -> TieredCache:
        return TieredCache(
            self.store,
            self.reader,
            LeastRecent(),
            ram_slots=ram,
            vram_slots=vram,
            transfer=transfer,
            frequency=ExpertFrequency(self.layers, self.experts),
            **more,
        )  # type: ignore[arg-type]

    def check(self, key: Key, address: int, transfer: LaggingTransfer, place: int = VRAM) -> None:
        """That ``key`` lies whole at ``address``."""
        assert transfer.on_device(address) == (place == VRAM)
        found = ctypes.string_at(address, len(self.bytes[key]))
        assert found == self.bytes[key], f"{key} is not at its address"


def token(
    bench: Bench, cache: TieredCache, transfer: LaggingTransfer, choice: Choice, layers: int | None = None
) -> set[Key]:
    """A decode step as the graph does it: kernels that look experts up by the tables as they run, while the
    host fetches what the device cannot reach. Returns what was fetched. A step of only the first ``layers``
    was given up there."""
    fetched: set[Key] = set()
    table = cache.vram.address_table
    cache.begin_token()
    cache.prefetch([(bench.layers[0], (choice[0][0] + 1) % bench.experts)], set())
    for row, layer in enumerate(bench.layers[:layers]):
        missing: list[int] = []

        def ring(row: int = row, missing: list[int] = missing) -> None:
            missing += [e for e in choice[row] if int(table.places[row, e]) == ELSEWHERE]

        def compute(row: int = row, layer: int = layer) -> None:
            for expert in choice[row]:
                place, address = (int(table.places[row, expert]), int(table.addresses[row, expert]))
                assert (address == 0) == (place == ELSEWHERE)
                if address:
                    bench.check((layer, expert), address, transfer, place)

        transfer.done(transfer.launch(ring))
        transfer.launch(compute)
        # Once one is missing, the host computes its part of those in pinned memory there, too.
        pinned = [e for e in choice[row] if missing and table.posted_places[table.row(layer), e] == PINNED]
        for expert, weights in cache.fetch(layer, missing + pinned):
            tensors = weights.gate_proj.tensors
            record = cache.store.record(layer, expert)
            start = min(tensor.data_ptr() for tensor in tensors.values())
            bench.check((layer, expert), start, transfer, PINNED)
            assert len(record.weights) == 3
        fetched |= {(layer, expert) for expert in missing}
        if missing and row + 1 < len(bench.layers):  # the host guesses what is next, half of it wrongly
            guess = [*choice[row + 1][:2], (choice[row][0] + 3) % bench.experts]
            cache.prefetch([(bench.layers[row + 1], expert) for expert in guess], {(layer, e) for e in missing})
    transfer.done(transfer.mark())
    if layers is not None:
        cache.drop_token()
        return fetched
    cache.end_token()
    cache.after_token(np.array(choice))
    return fetched


def prompt(
    bench: Bench, cache: TieredCache, transfer: LaggingTransfer, choice: Choice, *, large: bool
) -> dict[Key, int]:
    """A prompt's chunk, layer by layer. Returns how often each expert was copied to the device."""
    copied: dict[Key, int] = {}
    original = cache.vram.stage

    def spy(key: Key, slot: int, after: object) -> object:
        copied[key] = copied.get(key, 0) + 1
        return original(key, slot, after)

    cache.vram.stage = spy  # type: ignore[method-assign]
    for row, layer in enumerate(bench.layers):
        following = [(bench.layers[row + 1], e) for e in choice[row + 1]] if row + 1 < len(choice) else []
        seen: set[int] = set()
        for batch in cache.batches(layer, np.array(choice[row]), following if large else (), tokens=16):
            for expert, slot in batch.items():
                address = cache.vram.address(slot, (layer, expert))
                seen.add(expert)
                transfer.launch(lambda k=(layer, expert), a=address: bench.check(k, a, transfer))  # type: ignore[misc]
        assert seen == set(choice[row])
    cache.vram.stage = original  # type: ignore[method-assign]
    return copied


def consistent(bench: Bench, cache: TieredCache) -> None:
    """What holds between steps: slots, tables and tiers tell the same story, and no expert lies twice."""
    vram, host, table = cache.vram.slot_table, cache.host, cache.vram.address_table
    for held, slots in ((vram, cache.vram.slots.count - cache.staging.slots), (host, cache.arena.slots)):
        used = [*held.free, *held.slot_of.values()]
        assert len(set(used)) == len(used) == slots
    for key in bench.store.experts():
        at = table.row(key[0]), key[1]
        place, address = int(table.noted_places[at]), int(table.noted_addresses[at])
        start = bench.store.record(*key).start
        assert (place == VRAM) == cache.vram.resident(key) == (cache.tier_of(key) == "vram")
        if place == VRAM:
            assert address == cache.vram.address(vram.slot_of[key], key)
            assert key not in host or key in cache.vram.leaving, "a resident has a host copy"
        elif place == PINNED:
            assert address == cache.arena.device_address(host.slot_of[key]) + start
            assert cache.tier_of(key) == "ram"
        else:
            assert address == 0
