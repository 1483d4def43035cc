"""Device memory that went to other programs: when it is taken again, if that was asked for."""

import pytest

from offload.experts.cache.tiered_cache import TieredCache
from tests.offload.lagging import LaggingTransfer
from tests.offload.tiers import Bench, consistent, token


def shrunk(bench: Bench, *, free: int = 0, allowed: int = 2**40) -> tuple[TieredCache, LaggingTransfer, int]:
    """A cache of 16 device slots that has given a segment back when ``free`` bytes were left to anybody; its
    transfer; the segment's bytes."""
    slot = bench.store.slot_bytes
    transfer = LaggingTransfer(4, limit=16 * slot)
    cache = bench.cache(transfer, ram=10, vram=16, seeds=bench.store.experts(), regain=True)
    transfer.limit, transfer.allowed = free, allowed
    assert cache.regain is not None
    cache.regain.spare = slot
    return cache, transfer, cache.shrink_vram()


def tokens(cache: TieredCache, count: int) -> None:
    for _ in range(count):
        cache.begin_token()
        cache.end_token()


def test_slots_that_went_to_others_come_back_when_there_has_been_room_for_a_while(bench: Bench) -> None:
    cache, transfer, freed = shrunk(bench)
    room = freed + bench.store.slot_bytes
    transfer.limit = room - 1  # not enough, however long
    tokens(cache, 8 * 256)
    assert cache.vram.slots.count == 14
    transfer.limit = room
    tokens(cache, 2 * 256)
    transfer.limit = room - 1  # for a moment only
    tokens(cache, 256)
    transfer.limit = room
    tokens(cache, 3 * 256 - 1)
    assert cache.vram.slots.count == 14
    tokens(cache, 1)
    assert cache.vram.slots.count == 16 and transfer.limit == bench.store.slot_bytes
    assert [note for note in cache.notes if "given back" in note and "taken again" in note] == cache.notes
    consistent(bench, cache)
    for index in range(80):  # they fill by way of swaps, and are used
        token(bench, cache, transfer, [[index % 8, (index + 3) % 8], [1, 4], [2, 5], [6, 7]])
        consistent(bench, cache)
    assert cache.vram.free <= cache.vram.reserve + 1
    tokens(cache, 3000)
    assert cache.vram.slots.count == 16, "there is nothing more to come back"


def test_segments_come_back_one_by_one_while_there_is_room(bench: Bench) -> None:
    cache, transfer, freed = shrunk(bench)
    assert cache.shrink_vram() == cache.shrink_vram() == freed
    transfer.limit = 2 * freed + bench.store.slot_bytes
    counts = []
    for _ in range(8):
        tokens(cache, 256)
        counts.append(cache.vram.slots.count)
        consistent(bench, cache)
    assert counts == [10, 10, 12, 14, 14, 14, 14, 14], "the third finds no room"


def test_slots_that_go_again_stay_away_for_longer(bench: Bench) -> None:
    cache, transfer, freed = shrunk(bench)
    for wait in (3, 6, 12):
        transfer.limit = freed + bench.store.slot_bytes
        tokens(cache, wait * 256 - 1)
        assert cache.vram.slots.count == 14
        tokens(cache, 1)
        assert cache.vram.slots.count == 16
        transfer.limit = 0
        assert cache.shrink_vram() == freed
        consistent(bench, cache)


def test_slots_given_back_within_the_own_limit_do_not_come_back(bench: Bench) -> None:
    cache, transfer, freed = shrunk(bench, free=2**30, allowed=100)
    transfer.allowed = 2 * freed
    tokens(cache, 3000)
    assert cache.vram.slots.count == 14


def test_a_segment_that_somebody_else_takes_first_is_asked_for_later(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, transfer, freed = shrunk(bench)
    transfer.limit = freed - 1
    monkeypatch.setattr(transfer, "memory_left", lambda: (2**30, 2**30))
    tokens(cache, 3 * 256)
    assert cache.vram.slots.count == 14
    transfer.limit = freed
    tokens(cache, 6 * 256)
    assert cache.vram.slots.count == 16


def test_without_being_asked_to_nothing_is_taken_again(bench: Bench) -> None:
    transfer = LaggingTransfer(4, limit=16 * bench.store.slot_bytes)
    cache = bench.cache(transfer, ram=10, vram=16, seeds=bench.store.experts())
    cache.shrink_vram()
    transfer.limit = 2**40
    tokens(cache, 3000)
    assert cache.vram.slots.count == 14
