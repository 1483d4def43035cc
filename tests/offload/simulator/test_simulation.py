"""Replays agree with closed forms and with the plan's arithmetic, and move with the hardware."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from offload.experts.storage.slot_table import SlotTable
from offload.hardware.probe import Machine
from offload.plan.cost_model import FORESEEN, OF_PCIE, OF_VRAM, dimm_rate, miss_split, rows_of, with_prefetch_bytes
from offload.plan.footprint import Footprint
from offload.plan.plan import Plan
from offload.plan.planner import make_plan
from offload.routing.eviction import make_policy
from offload.routing.trace import Synthetic, Trace
from offload.simulator.requests import Tiers, TokenRequests, drawn, replayed, shares, stretched
from offload.simulator.simulation import SimulatedPhase, Simulation
from offload.simulator.workload import Rates, Work
from offload.tiers import Tier
from quant.model.known_shapes import load_shape
from quant.model.mixed_precision import joined
from quant.model.recipe import load_recipe
from quant.model.shape import ModelShape
from quant.scheme import Scheme
from tests.machines import GIB, RTX_4090, machine

SHAPES = {name: ModelShape.from_config(load_shape(name)) for name in ("scout", "maverick", "mini-scout")}
FAST = load_recipe("fast").schemes
DESKTOP = machine(gpu=RTX_4090)
CPU_ONLY = replace(machine(ram_gb_s=33, disk_gb_s=2.8), cores=2, int8_gops=700)


def setup(shape: str = "scout", on: Machine = DESKTOP, *, part: float | None = None, **options: Any) -> Simulation:
    plan = make_plan(SHAPES[shape], FAST, on, kv_bits=8, **options)
    return Simulation.of(SHAPES[shape], FAST, plan, on, gpu_part=part)


@pytest.mark.parametrize("shape", SHAPES)
def test_work_counts_the_bytes_that_the_plan_counts(shape: str) -> None:
    footprint = Footprint(SHAPES[shape], FAST, 4096, 8)
    load = footprint.load(filled=1000, vram_hits=0, hits=1, resident=1)
    work = Work.of(footprint, 1000)
    assert work.dense == pytest.approx(load.dense + load.kv, rel=1e-6)
    assert sum(layer.routes for layer in work.layers) == load.moe_layers
    weights = sum(layer.attention_weights + layer.mlp_weights for layer in work.layers)
    assert (weights, work.head_weights) == (load.dense_weights, load.head_weights)


def everywhere(tier: Tier, of: Simulation) -> Simulation:
    rates = {name: float(name == tier) for name in ("vram", "ram", "disk")}
    return replace(of, plan=replace(of.plan, hit_rates=rates))


def test_with_all_experts_in_vram_a_token_takes_its_bytes_over_the_cards_bandwidth() -> None:
    of = everywhere("vram", setup())
    rates, work = Rates.of(DESKTOP), Work.of(of.footprint, of.plan.filled)
    nbytes = work.dense + 48 * work.expert
    expected = nbytes / (1008e9 * OF_VRAM) + 48 * rates.layer + rates.step
    found = of.decode(8)
    assert 1 / found.tokens_per_s == pytest.approx(expected)
    assert found.moved["vram"] == pytest.approx(nbytes) and found.moved["ram"] == found.moved["disk"] == 0


def test_a_miss_on_the_cpu_hides_the_shared_expert() -> None:
    of = everywhere("ram", setup(part=0.0))
    rates, work = Rates.of(DESKTOP), Work.of(of.footprint, of.plan.filled)
    miss = rates.ring + work.expert / rates.cpu_read(work.expert, work.expert_weights)
    beside = work.dense - 48 * work.layers[0].mlp  # all but the shared experts
    expected = beside / rates.vram + 48 * (miss + rates.layer) + rates.step
    assert 1 / of.decode(8).tokens_per_s == pytest.approx(expected)


def test_a_miss_is_shorter_by_what_was_read_ahead() -> None:
    on = with_prefetch_bytes(DESKTOP, 2**22)
    without, with_cache = (everywhere("ram", setup(on=one, part=0.0)) for one in (DESKTOP, on))
    rates, work = Rates.of(on), Work.of(with_cache.footprint, with_cache.plan.filled)
    rate = rates.cpu_read(work.expert, work.expert_weights)
    saved = 47 * FORESEEN * 2**22 * (1 / rate - 1 / rates.cached)
    before, after = without.decode(8), with_cache.decode(8)
    assert 1 / before.tokens_per_s - 1 / after.tokens_per_s == pytest.approx(saved)
    assert after.moved["ram"] == pytest.approx(before.moved["ram"])  # read all the same, only earlier
    plenty = everywhere("ram", setup(on=with_prefetch_bytes(DESKTOP, 2**30), part=0.0)).decode(8)
    idle = rates.ring + work.layers[1].attention / rates.vram + work.layers[1].kv / rates.vram + rates.layer
    most = 47 * FORESEEN * idle * rate * (1 / rate - 1 / rates.cached)
    assert 1 / before.tokens_per_s - 1 / plenty.tokens_per_s == pytest.approx(most, rel=0.05)


def test_a_miss_read_in_place_goes_at_the_speed_of_the_bus() -> None:
    of = everywhere("ram", setup(part=1.0))
    found, work = of.decode(8), Work.of(of.footprint, of.plan.filled)
    assert found.waited["pcie"] == pytest.approx(48 * work.expert / (25e9 * OF_PCIE))
    assert "cpu" not in found.waited and found.moved["cpu"] == 0


def test_from_disk_alone_a_token_waits_for_the_disk() -> None:
    of = everywhere("disk", setup("maverick"))
    found, work = of.decode(8), Work.of(of.footprint, of.plan.filled)
    assert 24 * work.expert <= found.moved["disk"] < 1.5 * 24 * work.expert  # wrong guesses are read, too
    assert found.limited_by == "disk"
    assert 1 / found.tokens_per_s > 24 * work.expert / 6.5e9


def test_bytes_are_conserved_over_tiers() -> None:
    of = setup()
    found, work = of.decode(48), Work.of(of.footprint, of.plan.filled)
    routed = 48 * work.expert
    assert found.moved["vram"] == pytest.approx(work.dense + found.hit_rates["vram"] * routed)
    assert found.moved["ram"] == pytest.approx(found.moved["cpu"] + found.moved["pcie"])
    assert found.moved["ram"] == pytest.approx(found.hit_rates["ram"] * routed)
    assert sum(found.waited.values()) == pytest.approx(1 / found.tokens_per_s)
    assert all(0 <= share <= 1 + 1e-9 for share in found.used.values())


def faster(on: Machine, what: str, times: float) -> Machine:
    if what == "cache_bytes":
        return replace(on, cache_bytes=int(2**23 * times))
    if what in ("ram_gb_s", "disk_gb_s", "int8_gops"):
        return replace(on, **{what: getattr(on, what) * times})
    assert on.gpu is not None
    return replace(on, gpu=replace(on.gpu, **{what: getattr(on.gpu, what) * times}))


@pytest.mark.parametrize(
    "what", ["cache_bytes", "ram_gb_s", "disk_gb_s", "int8_gops", "vram_gb_s", "h2d_gb_s", "bf16_tflops"]
)
@pytest.mark.parametrize("shape", ["scout", "maverick"])
def test_more_of_anything_is_never_slower(shape: str, what: str) -> None:
    speeds = []
    for times in (1.0, 1.3, 3.0):
        of = setup(shape, faster(DESKTOP, what, times), filled=1024)
        speeds.append((of.decode(12).tokens_per_s, of.prefill(1024).tokens_per_s))
    assert all(a <= b * (1 + 1e-9) for one, more in pairwise(speeds) for a, b in zip(one, more, strict=True))


CASES = {
    "scout on a 4090": ("scout", DESKTOP, {}),
    "scout beside caches": ("scout", with_prefetch_bytes(DESKTOP, 20 * 2**20), {}),
    "scout beside caches where a split pays": (
        "scout",
        with_prefetch_bytes(replace(DESKTOP, gpu=replace(RTX_4090, together_gb_s=85)), 20 * 2**20),
        {},
    ),
    "maverick beside caches": ("maverick", with_prefetch_bytes(DESKTOP, 20 * 2**20), {}),
    "scout in 12 GiB": ("scout", DESKTOP, {"vram": 12 * GIB}),
    "scout where a split pays": ("scout", replace(DESKTOP, gpu=replace(RTX_4090, together_gb_s=85)), {}),
    "maverick on a 4090": ("maverick", DESKTOP, {}),
    "mini-scout on a CPU": ("mini-scout", CPU_ONLY, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_replay_and_plan_agree_within_ten_percent(case: str) -> None:
    shape, on, options = CASES[case]
    of = setup(shape, on, filled=512, **options)
    assert of.decode(64).tokens_per_s == pytest.approx(of.plan.decode.tokens_per_s, rel=0.1)
    if of.plan.hit_rates["disk"] == 0:
        assert of.prefill(512).tokens_per_s == pytest.approx(of.plan.prefill.tokens_per_s, rel=0.1)


# ram GB/s, disk GB/s, --ram in GiB (0: all), and what docs/measurements.md and docs/planning.md measured.
MEASURED = [
    (31, 3.0, 0.0, 46.9),
    (32, 2.9, 3.5, 39.2),
    (31, 2.9, 3.0, 32.4),
    (44, 2.9, 2.6, 27.2),
    (32, 2.9, 2.2, 20.6),
    (31.7, 2.99, 2.2, 21.9),
    (44.1, 2.94, 2.2, 22.1),
    (33, 3.0, 1.2, 15.1),
]


@pytest.mark.parametrize(("ram_gb_s", "disk_gb_s", "ram", "measured"), MEASURED)
def test_on_a_cpu_and_from_disk_it_says_what_was_measured(
    ram_gb_s: float, disk_gb_s: float, ram: float, measured: float
) -> None:
    on = replace(CPU_ONLY, ram_gb_s=ram_gb_s, disk_gb_s=disk_gb_s)
    shape, schemes = SHAPES["mini-scout"], load_recipe("mini-scout").schemes
    plan = make_plan(shape, schemes, on, ram=int(ram * GIB) or None, context=1024)
    found = Simulation.of(shape, schemes, plan, on).decode(96)
    assert found.tokens_per_s == pytest.approx(measured, rel=0.1)


def test_a_split_is_taken_only_where_the_memory_has_more_than_the_cpu_takes() -> None:
    expert, weights = 64_880_640, 125_829_120
    assert miss_split(DESKTOP, expert, weights).gpu_part == 0
    roomy = replace(DESKTOP, gpu=replace(RTX_4090, together_gb_s=90))
    split = miss_split(roomy, expert, weights)
    assert 0.1 < split.gpu_part < 0.4 and split.gb_s > 1.2 * split.cpu_gb_s
    assert split.gb_s * 1e9 <= dimm_rate(roomy) * (1 + 1e-9)
    assert rows_of(split.gpu_part, 8192, 128) % 128 == 0 and 0 < rows_of(split.gpu_part, 8192, 128) < 8192
    slow_cpu = replace(DESKTOP, int8_gops=10)
    assert miss_split(slow_cpu, expert, weights).gpu_part > 0.5


def test_the_split_of_the_rates_is_the_best_there_is() -> None:
    on = replace(DESKTOP, gpu=replace(RTX_4090, together_gb_s=90))
    best = everywhere("ram", setup(on=on))
    at = best.decode(4).tokens_per_s
    for part in (0.0, best.part - 0.08, best.part + 0.08, 0.6, 1.0):
        assert replace(best, gpu_part=part).decode(4).tokens_per_s < at


def test_prefill_is_bound_by_the_bus_and_then_by_arithmetic() -> None:
    of = setup(context=8192, prompt_chunk=2048)
    found, work = of.prefill(2048), Work.of(of.footprint, 2048)
    cold = (1 - of.plan.vram_slots / of.plan.experts) * 48 * 16 * work.expert
    assert found.limited_by == "pcie"
    assert 2048 / found.tokens_per_s == pytest.approx(cold / (25e9 * OF_PCIE), rel=0.1)
    assert 2048 * found.moved["pcie"] == pytest.approx(cold, rel=0.01)
    in_vram = replace(of, plan=replace(of.plan, vram_slots=of.plan.experts, ram_slots=0))
    assert in_vram.prefill(2048).limited_by == "compute"


def test_larger_prompt_chunks_read_experts_less_often() -> None:
    rates = [setup(context=8192, prompt_chunk=chunk).prefill(4096).tokens_per_s for chunk in (512, 2048, 4096)]
    assert rates == sorted(rates) and rates[2] > 3 * rates[0]


def test_drawn_requests_have_the_shares_that_were_asked_for() -> None:
    found = shares(drawn({"vram": 0.3, "ram": 0.5, "disk": 0.2}, 48, 1, 50))
    assert found == pytest.approx({"vram": 0.3, "ram": 0.5, "disk": 0.2}, abs=0.01)


def tiers(trace: Trace, **more: Any) -> Tiers:
    return Tiers(trace=trace, policy=lambda: make_policy("lru"), **more)


def test_a_profile_puts_the_hottest_into_vram() -> None:
    trace = Trace("made", 4, [[[0], [3]]] * 6)
    counts = trace.counts()
    seeded = replayed(tiers(trace, vram_slots=2, ram_slots=6, counts=counts))
    assert shares(seeded)["vram"] == 1.0
    assert shares(replayed(tiers(trace, vram_slots=2, ram_slots=6)))["vram"] == 0.5


def test_swaps_follow_use_keep_the_number_of_slots_and_are_no_more_than_allowed() -> None:
    trace = Trace("made", 4, [[[3]]] * 20)
    state = tiers(trace, vram_slots=1, ram_slots=3, swaps=1)
    steps = replayed(state)
    assert shares(steps[:1])["ram"] == 1.0 and shares(steps[2:])["vram"] == 1.0
    assert sum(step.swaps for step in steps) == 1 == sum(step.refills for step in steps)
    assert len(state.vram) == 1 and len(state.ram) == 3 and not state.vram & state.ram


def test_without_a_slot_anywhere_an_expert_comes_from_disk_and_stays() -> None:
    trace = Trace("made", 4, [[[3]], [[3]], [[2]], [[3]]])
    found = [step.tiers[0][0] for step in replayed(tiers(trace, vram_slots=0, ram_slots=2))]
    assert found == ["disk", "ram", "disk", "ram"]


@pytest.mark.parametrize("room", [30, 61, 100])
@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_experts_of_different_size_share_ram_by_bytes_as_the_real_cache_does(room: int, policy: str) -> None:
    trace = Synthetic("zipf", layers=3, tokens=200).trace()
    keys = [(layer, expert) for expert in range(trace.num_experts) for layer in range(3)]
    sizes = {(layer, expert): (1, 3, 5)[(layer + expert) % 3] for layer, expert in keys}
    state = Tiers(trace, vram_slots=0, ram_slots=1, policy=lambda: make_policy(policy), sizes=sizes, ram_bytes=room)
    table, real = SlotTable(len(keys), room, sizes.__getitem__), make_policy(policy)
    for key in list(table.fitting(keys)):
        table.take(key)
    for token in trace.steps:
        expected: list[Tier] = []
        for layer, experts in enumerate(token):
            for expert in experts:
                key = (layer, expert)
                expected.append("ram" if key in table else "disk")
                while key not in table and not table.has_room(key):
                    table.release(real.victim(table.slot_of, {(layer, one) for one in experts} & set(table.slot_of)))
                if key not in table:
                    table.take(key)
                real.touch(key)
        assert [tier for tiers in state.step(token).tiers for tier in tiers] == expected
        assert state.ram == set(table.slot_of) and sum(sizes[key] for key in state.ram) <= room


def test_a_mixture_on_a_cpu_is_simulated_by_the_bytes_that_were_planned() -> None:
    shape = SHAPES["maverick"]
    layers = {layer: Scheme("int4" if layer % 4 == 1 else "int2", 64) for layer in shape.moe_layers}
    mixed = joined(
        (linear, layers[layer])
        for layer in shape.moe_layers
        for e in range(128)
        for linear in shape.expert_linears(layer, e)
    )
    plan = make_plan(shape, mixed, CPU_ONLY, kv_bits=8)
    of = Simulation.of(shape, mixed, plan, CPU_ONLY)
    sizes = of._sizes()
    assert sizes is not None and len(set(sizes.values())) == 2
    largest = max(sizes.values())
    steps = of.steps(40, Synthetic("zipf", layers=24, num_experts=128, tokens=64).trace())
    assert plan.ram_bytes // largest < plan.ram_slots < plan.experts and shares(steps)["disk"] > 0


def test_a_trace_of_few_layers_is_stretched_over_many_that_differ() -> None:
    trace = Synthetic("uniform", layers=4, tokens=400).trace()
    long = stretched(trace, 48, 100)
    assert (long.layers, len(long.steps)) == (48, 100)
    columns = {tuple(step[layer][0] for step in long.steps) for layer in range(48)}
    assert len(columns) == 48
    assert stretched(trace, 4, 100).steps == trace.steps[:100]


def test_hot_experts_and_swaps_make_scout_faster_on_skewed_routing() -> None:
    past, future = Synthetic("zipf", layers=48, tokens=256).trace().halves()
    of = setup()

    def speed(of: Simulation, **known: Any) -> float:
        found: SimulatedPhase = of.decode(48, trace=future, **known)
        return found.tokens_per_s

    cold, hot = speed(of), speed(of, counts=past.counts())
    assert hot > 1.2 * cold
    assert speed(replace(of, swaps=1)) > cold


def test_scout_on_a_24_gb_card_replays_above_20_tokens_per_s() -> None:
    recipe = load_recipe("scout-rtx4090")
    plan = make_plan(
        SHAPES["scout"],
        recipe.schemes,
        DESKTOP,
        vram=recipe.vram,
        ram=recipe.ram,
        context=recipe.context or 0,
        kv_bits=8 if recipe.kv == "int8" else 16,
    )
    found = Simulation.of(SHAPES["scout"], recipe.schemes, plan, DESKTOP).decode(32)
    assert found.tokens_per_s >= 20


def test_a_plan_without_a_gpu_is_replayed_without_one() -> None:
    plan: Plan = make_plan(SHAPES["mini-scout"], FAST, DESKTOP, vram=0)
    found = Simulation.of(SHAPES["mini-scout"], FAST, plan, DESKTOP).decode(4)
    assert "vram" not in found.used and found.limited_by == "ram bandwidth"


def test_an_empty_step_still_takes_its_fixed_price() -> None:
    assert drawn({"ram": 1.0}, 2, 1, 1) == [TokenRequests((("ram",), ("ram",)))]
