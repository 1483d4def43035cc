"""Experts over disk, RAM and a device that lags behind: whoever uses one finds all of its bytes."""

import gc
import hashlib
import weakref

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offload.experts.cache.address_table import PINNED, VRAM, AddressTable
from offload.experts.storage.transfer import Transfer
from quant.errors import BudgetError
from tests.offload.lagging import LaggingTransfer
from tests.offload.tiers import Bench, Choice, consistent, prompt, token

RESERVE = 2  # device slots that hold no expert for good
KINDS = ["token", "token", "token", "prompt", "large", "fill", "wait", "given up", "shrink", "regain"]
QUICK = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def choices(bench_experts: int = 8, layers: int = 4, most: int = 3) -> st.SearchStrategy[Choice]:
    ids = st.lists(st.integers(0, bench_experts - 1), min_size=most, max_size=most, unique=True)
    return st.lists(ids, min_size=layers, max_size=layers)


@given(
    steps=st.lists(st.tuples(st.sampled_from(KINDS), choices()), max_size=10),
    ram=st.integers(2, 30),
    vram=st.integers(1, 20),
    pinned_part=st.sampled_from([0.0, 0.5, 1.0]),
    seeds=st.integers(0, 32),
    seed=st.integers(0, 2**16),
)
@QUICK
def test_every_expert_is_whole_when_used_however_the_device_lags(
    bench: Bench, steps: list[tuple[str, Choice]], ram: int, vram: int, pinned_part: float, seeds: int, seed: int
) -> None:
    run(bench, steps, ram, vram, pinned_part, seeds, LaggingTransfer(seed), seed)


def run(
    bench: Bench,
    steps: list[tuple[str, Choice]],
    ram: int,
    vram: int,
    pinned_part: float,
    seeds: int,
    transfer: LaggingTransfer,
    seed: int,
) -> None:
    slot = bench.store.slot_bytes
    transfer.limit = vram * slot
    transfer.pinnable = int(ram * pinned_part) * slot
    order = bench.store.experts()
    cache = bench.cache(transfer, ram, vram, seeds=order[seed % 7 :][:seeds], regain=True)
    regain = cache.regain
    assert regain is not None
    consistent(bench, cache)
    for kind, choice in steps:
        if kind == "token":
            token(bench, cache, transfer, choice)
        elif kind == "fill":
            cache.fill()
        elif kind == "wait":
            cache.wait()
        elif kind == "given up":
            token(bench, cache, transfer, choice, choice[0][0] % 5)
        elif kind == "shrink":
            transfer.limit += cache.shrink_vram()
            regain.spare = -(2**40)
        elif kind == "regain":
            regain._tokens, regain._found = 255, 99
            cache.rebalance()
        else:
            vram_before = {key for key in order if key in cache.vram}
            copied = prompt(bench, cache, transfer, choice, large=kind == "large")
            assert all(count == 1 for count in copied.values()), "a cold expert was copied twice in a chunk"
            assert kind == "large" or len(copied.keys() & vram_before) <= 1, "residents were copied again"
            cache.rebalance()
        consistent(bench, cache)
    transfer.drain()
    cache.wait()
    cache.close()


@pytest.mark.parametrize("seed", range(3))
def test_the_same_holds_when_copies_land_from_another_thread(bench: Bench, seed: int) -> None:
    random = np.random.default_rng(seed)
    transfer = LaggingTransfer(seed, threaded=True)
    try:
        kinds = random.choice(KINDS, 40)
        steps = [(str(kind), [random.choice(8, 3, replace=False).tolist() for _ in bench.layers]) for kind in kinds]
        run(bench, steps, ram=12, vram=10, pinned_part=1.0, seeds=8, transfer=transfer, seed=seed)
    finally:
        transfer.close()


def ask(bench: Bench, expert: int) -> Choice:
    """A token that asks for ``expert`` in the first layer and for expert 0 in the others."""
    return [[expert], *[[0]] * (len(bench.layers) - 1)]


def test_a_hot_expert_takes_a_cold_ones_place_and_neither_is_ever_out_of_reach(bench: Bench) -> None:
    transfer = LaggingTransfer(1)
    order = bench.store.experts()
    cold = [(layer, expert) for layer in bench.layers[1:] for expert in (5, 6, 7)]
    cache = bench.cache(transfer, ram=len(order) - 9, vram=9 + RESERVE, seeds=cold)
    cache.fill()
    cache.wait()
    for _ in range(40):
        assert not token(bench, cache, transfer, ask(bench, 3)) & set(cold), "it was forgotten, not moved"
        consistent(bench, cache)
        cache.wait()  # what leaves the device does so once the disk has given its copy
    hot = [(bench.layers[0], 3), *((layer, 0) for layer in bench.layers[1:])]
    assert all(cache.tier_of(key) == "vram" for key in hot)
    cache.wait()
    cache.rebalance()
    tiers = [cache.tier_of(key) for key in order]
    assert tiers.count("disk") == 0 and tiers.count("vram") >= 9, "what left the device came back to RAM"


def test_without_reason_nothing_is_swapped(bench: Bench) -> None:
    transfer = LaggingTransfer(1)
    cache = bench.cache(transfer, ram=30, vram=6, seeds=bench.store.experts()[:4])
    cache.fill()
    cache.wait()
    random = np.random.default_rng(0)
    begun: list[int] = []
    for _ in range(20):  # every expert as often as the next
        for expert in random.permutation(8).tolist():
            token(bench, cache, transfer, [[expert]] * 4)
        begun.append(len(transfer.copies))
    assert begun[-1] - begun[4] <= 1, "swapped by chance"


def test_an_expert_on_its_way_to_the_device_is_awaited_by_a_prompt(bench: Bench) -> None:
    transfer = LaggingTransfer(3, lazy=True)
    cache = bench.cache(transfer, ram=8, vram=4)
    first = (bench.layers[0], 0)
    assert list(cache.fetch(*([first[0], [first[1]]]))) and cache.tier_of(first) == "ram"
    cache.after_token(np.array(ask(bench, 0)))
    cache.drop_token()
    cache.rebalance()
    assert first in cache.vram and not cache.vram.resident(first)
    transfer.hurries = True
    prompt(bench, cache, transfer, ask(bench, 0), large=False)
    transfer.drain()


def test_a_host_slot_that_is_being_copied_to_the_device_is_not_overwritten(bench: Bench) -> None:
    transfer = LaggingTransfer(3, lazy=True)
    cache = bench.cache(transfer, ram=2, vram=6)
    layer, hot = bench.layers[0], (bench.layers[0], 0)
    assert list(cache.fetch(layer, [0]))
    cache.after_token(np.array(ask(bench, 0)))
    cache.drop_token()
    cache.rebalance()
    assert hot in cache.vram.arriving
    for expert in (1, 2, 3):  # read into the other slot, one after another
        assert list(cache.serve_from_host([(layer, expert)]))
    transfer.drain()
    cache.rebalance()
    bench.check(hot, cache.vram.address(cache.vram.slot_table.slot_of[hot], hot), transfer)


def test_tables_are_posted_as_they_were_at_each_flush(bench: Bench) -> None:
    transfer = LaggingTransfer(5, lazy=True)
    tables = AddressTable(bench.layers, bench.experts, transfer)
    seen: list[int] = []
    for address in range(1, 7):
        tables.set((bench.layers[0], 0), VRAM, address)
        tables.flush()
        transfer.launch(lambda: seen.append(int(tables.addresses[0, 0])))
    transfer.drain()
    assert seen == [1, 2, 3, 4, 5, 6]


def test_a_large_chunk_takes_slots_that_are_filled_again(bench: Bench) -> None:
    transfer = LaggingTransfer(2)
    order = bench.store.experts()
    seeds = [key for key in order if key[1] < 5]
    cache = bench.cache(transfer, ram=12, vram=len(seeds) + RESERVE, seeds=seeds)
    cache.frequency.count(bench.layers[0], np.array([0, 1, 2, 3, 4]), 1)
    every = [list(range(8))] * 4
    copied = prompt(bench, cache, transfer, every, large=True)
    spared = [key for key in seeds if key not in cache.vram]
    assert len(spared) <= max(RESERVE, cache.vram.slots.count // 8) - RESERVE
    assert copied == dict.fromkeys([key for key in order if key[1] >= 5 or key in spared], 1)
    assert not any(key[0] == bench.layers[0] for key in spared), "the hottest made way"
    for _ in range(30):
        transfer.drain()
        cache.wait()
        cache.rebalance()
    assert cache.vram.free == RESERVE and consistent(bench, cache) is None


def test_copies_of_a_prompt_run_ahead_of_its_compute(bench: Bench) -> None:
    """While a layer's last experts compute, the next layer's first ones are on their way."""
    transfer = LaggingTransfer(2)
    cache = bench.cache(transfer, ram=32, vram=4)
    cache.fill()
    cache.wait()
    first, second = bench.layers[:2]
    for _ in cache.batches(first, np.arange(8), [(second, expert) for expert in range(8)]):
        pass
    begun = len(transfer.copies)
    assert begun > 8, "no copy was begun ahead"
    for _ in cache.batches(second, np.arange(8)):
        pass
    assert len(transfer.copies) == 16


def test_experts_that_were_copied_ahead_for_nothing_make_room(bench: Bench) -> None:
    transfer = LaggingTransfer(2)
    cache = bench.cache(transfer, ram=32, vram=4)
    cache.fill()
    cache.wait()
    first, second = bench.layers[:2]
    for _ in range(3):
        for _ in cache.batches(first, np.array([1]), [(second, expert) for expert in range(8)]):
            pass
        for batch in cache.batches(second, np.array([7, 6])):
            for expert, slot in batch.items():
                address = cache.vram.address(slot, (second, expert))
                transfer.launch(
                    lambda k=(second, expert), a=address: bench.check(k, a, transfer)  # type: ignore[misc]
                )
    cache.rebalance()
    consistent(bench, cache)
    transfer.drain()


def test_memory_goes_back_to_the_driver_by_segments_and_the_run_goes_on(bench: Bench) -> None:
    transfer = LaggingTransfer(4)
    cache = bench.cache(transfer, ram=10, vram=16, seeds=bench.store.experts())
    held = cache.vram.slots.nbytes
    freed = cache.shrink_vram()
    assert freed == held // 8 and cache.vram.slots.nbytes == held - freed
    consistent(bench, cache)
    for _ in range(6):
        token(bench, cache, transfer, [[0, 3], [1, 4], [2, 5], [6, 7]])
        prompt(bench, cache, transfer, [[0, 3], [1, 4], [2, 5], [6, 7]], large=True)
    while cache.shrink_vram():
        pass
    assert cache.vram.slots.count == 2
    token(bench, cache, transfer, [[0, 3], [1, 4], [2, 5], [6, 7]])
    prompt(bench, cache, transfer, [[0, 3], [1, 4], [2, 5], [6, 7]], large=True)
    cache.rebalance()
    consistent(bench, cache)
    assert len([note for note in cache.notes if "gave back" in note or "given back" in note]) == 1


def test_a_step_that_failed_where_all_was_in_memory_is_tried_again_with_less(bench: Bench) -> None:
    """No host slot was kept for the disk, since nothing lay there; once slots are given back, one must be."""
    transfer = LaggingTransfer(4)
    order = bench.store.experts()
    cache = bench.cache(transfer, ram=len(order) - 14, vram=16, seeds=order)
    cache.fill()
    cache.wait()
    choice = [[0, 3], [1, 4], [2, 5], [6, 7]]
    cache.begin_token()
    assert not cache.host.free
    cache.shrink_vram()  # the step ran out of memory: see retry_with_less_vram
    assert any(cache.tier_of(key) == "disk" for key in order)
    token(bench, cache, transfer, choice)
    consistent(bench, cache)


def test_a_dropped_segment_is_not_kept_alive_by_views(bench: Bench) -> None:
    cache = bench.cache(Transfer(), ram=10, vram=16, seeds=bench.store.experts())
    for _ in cache.stream(bench.layers[0], range(8)):  # views are made
        pass
    memory = [weakref.ref(part) for part in cache.vram.slots._memory.values()]
    cache.shrink_vram()
    gc.collect()
    assert [ref() is None for ref in memory].count(True) == 1


def test_a_device_with_less_memory_than_planned_holds_fewer_experts_and_says_so(bench: Bench) -> None:
    slot = bench.store.slot_bytes
    transfer = LaggingTransfer(0, limit=10 * slot)
    cache = bench.cache(transfer, ram=12, vram=16, seeds=bench.store.experts())
    assert cache.vram.slots.count == 10
    assert any("10 of 16 expert slots" in note for note in cache.notes)
    token(bench, cache, transfer, [[0, 3], [1, 4], [2, 5], [6, 7]])
    consistent(bench, cache)
    with pytest.raises(BudgetError, match="bytes are left"):
        bench.cache(LaggingTransfer(0, limit=slot // 2), ram=12, vram=16)


def test_memory_that_cannot_be_pinned_is_left_to_the_cpu_and_said(bench: Bench) -> None:
    transfer = LaggingTransfer(0, pinnable=0)
    cache = bench.cache(transfer, ram=12, vram=4)
    cache.fill()
    cache.wait()
    assert not cache.arena.device_address(0) and not (cache.vram.address_table.noted_places == PINNED).any()
    assert [note for note in cache.notes if "could be pinned" in note]
    token(bench, cache, transfer, ask(bench, 0))


def test_a_device_that_holds_every_expert_spares_and_swaps_none(bench: Bench) -> None:
    transfer = LaggingTransfer(0)
    order = bench.store.experts()
    cache = bench.cache(transfer, ram=2, vram=len(order), seeds=order)
    assert cache.holds_all and all(cache.tier_of(key) == "vram" for key in order)
    begun = len(transfer.copies)
    for _ in range(5):
        prompt(bench, cache, transfer, [list(range(8))] * 4, large=True)
        token(bench, cache, transfer, [[0], [1], [2], [3]])
    assert len(transfer.copies) == begun == len(order)


def test_an_interrupted_step_leaves_the_cache_usable(bench: Bench) -> None:
    transfer = LaggingTransfer(0)
    cache = bench.cache(transfer, ram=6, vram=6, seeds=bench.store.experts())
    cache.begin_token()
    next(iter(cache.fetch(bench.layers[1], [5, 6])))
    prompt(bench, cache, transfer, [[0, 3], [1, 4], [2, 5], [6, 7]], large=True)
    for _ in cache.batches(bench.layers[0], np.arange(8)):
        break  # nobody asks for the rest
    cache.rebalance()
    consistent(bench, cache)
    token(bench, cache, transfer, [[0, 3], [1, 4], [2, 5], [6, 7]])


def test_the_checkpoint_is_as_it_was(bench: Bench) -> None:
    """Whatever the tests above did: nothing is written back."""
    for key, expected in bench.bytes.items():
        assert hashlib.sha256(bench._stored(key)).digest() == hashlib.sha256(expected).digest()


def test_requests_and_bytes_are_counted_by_tier(bench: Bench) -> None:
    transfer = LaggingTransfer(0)
    first = bench.layers[0]
    cache = bench.cache(transfer, ram=4, vram=4, seeds=[(first, 0), (first, 1)])
    cache.take_counters()
    token(bench, cache, transfer, [[0, 1, 2], [0], [0], [0]][:1] + [[0, 0, 0]] * 3)
    counters = cache.take_counters()
    guessed = counters.by_tier["ram"]  # what was read ahead and had landed
    assert counters.by_tier == {"vram": 2, "ram": guessed, "disk": 4 - guessed}
    by_layer = cache.requests.values()
    assert sum(row["vram"] for row in by_layer) >= 2
    assert sum(row["disk"] for row in by_layer) >= 4 - guessed
    nbytes = bench.store.record(first, 0).nbytes
    assert counters.used_bytes == {"vram": 2 * nbytes, "ram": 4 * nbytes, "disk": 0}
    assert counters.fetched["disk"] >= 4 * nbytes
