"""A plan accounts for every byte, stays within its budgets, and refuses with something that does fit."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.hardware.framework import FRAMEWORK_RAM, FRAMEWORK_VRAM
from offload.hardware.gpu import Gpu
from offload.hardware.gpu_catalog import described_machine
from offload.hardware.probe import Machine
from offload.plan.footprint import Footprint
from offload.plan.plan import Plan
from offload.plan.planner import make_plan
from quant.errors import BudgetError
from quant.model.families import QUANTIZABLE, Role
from quant.model.known_shapes import load_shape
from quant.model.recipe import load_recipe, recipe_names
from quant.model.shape import ModelShape
from quant.scheme import BF16, Scheme
from quant.sizes import parse_size
from tests.machines import GIB, RTX_4090, machine

SHAPES = {name: ModelShape.from_config(load_shape(name)) for name in ("scout", "maverick", "mini-scout")}
TINY: dict[str, Any] = {
    "model_type": "mixtral",
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 192,
    "vocab_size": 500,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
SHAPES["tiny, tied head, experts of no whole page"] = ModelShape.from_config(TINY)
SCHEMES = [Scheme("int4"), Scheme("int4", 32), Scheme("int8", 64), BF16]


@dataclass(frozen=True)
class Profile:
    """Routing statistics as a plan reads them."""

    counts: list[list[int]]
    reuse: list[list[int]]


def conserved(plan: Plan, footprint: Footprint, *, on_gpu: bool) -> None:
    """Every byte of the model is in exactly one row, and so is everything else the run takes."""
    model: Mapping[str, int] = footprint.shape.role_nbytes(footprint.schemes)
    experts = sum(row.nbytes for row in plan.rows if row.role.startswith("experts_"))
    assert experts == model["experts"]
    for role, nbytes in model.items():
        if role != "experts":
            assert sum(row.nbytes for row in plan.rows if row.role == role) == nbytes, role
    extra = footprint.kv_cache + footprint.scratch(plan.prompt_chunk, on_gpu=on_gpu) + FRAMEWORK_RAM
    extra += FRAMEWORK_VRAM if on_gpu else 0
    extra += sum(row.nbytes for row in plan.rows if row.role == "padding")
    assert sum(row.nbytes for row in plan.rows) == sum(model.values()) + extra
    assert sum(plan.total(tier) for tier in ("vram", "ram", "disk")) == sum(row.nbytes for row in plan.rows)


def within(plan: Plan) -> None:
    """No tier holds more than its budget, and slots are what the rows say."""
    assert plan.total("vram") <= plan.vram
    assert plan.total("ram") - plan.framework_bytes <= plan.ram
    slots = {"vram": plan.vram_slots, "ram": plan.ram_slots}
    names = {"vram": ("experts_hot",), "ram": ("experts_warm",)}
    for tier, count in slots.items():
        taken = sum(row.nbytes for row in plan.rows if row.tier == tier and row.role in (*names[tier], "padding"))
        assert taken == count * plan.slot_bytes


@pytest.mark.parametrize("recipe", recipe_names())
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gpu", [None, RTX_4090], ids=["no GPU", "RTX 4090"])
def test_every_byte_is_in_one_row_and_no_budget_is_exceeded(shape: str, recipe: str, gpu: Gpu | None) -> None:
    schemes = load_recipe(recipe).schemes
    plan = make_plan(SHAPES[shape], schemes, machine(gpu=gpu), context=2048)
    conserved(plan, Footprint(SHAPES[shape], schemes, 2048, 16), on_gpu=gpu is not None)
    within(plan)
    assert sum(plan.hit_rates.values()) == pytest.approx(1)


@settings(max_examples=150, deadline=None)
@given(
    shape=st.sampled_from(sorted(SHAPES)),
    kinds=st.dictionaries(st.sampled_from(QUANTIZABLE), st.sampled_from(SCHEMES)),
    vram=st.one_of(st.none(), st.integers(0, 26 * GIB)),
    ram=st.integers(0, 70 * GIB),
    context=st.integers(1, 200_000),
    kv_bits=st.sampled_from([8, 16, 32]),
    chunk=st.one_of(st.none(), st.integers(1, 5000)),
)
def test_whatever_is_asked_it_fits_or_is_refused(
    shape: str, kinds: dict[Role, Scheme], vram: int | None, ram: int, context: int, kv_bits: int, chunk: int | None
) -> None:
    options: dict[str, Any] = {"vram": vram, "ram": ram, "context": context, "kv_bits": kv_bits, "prompt_chunk": chunk}
    refusals: list[str] = []
    try:
        plan = make_plan(SHAPES[shape], kinds, machine(gpu=RTX_4090), **options)
    except BudgetError as error:
        refusals.append(str(error))
    if refusals:
        assert "\n" not in refusals[0] and ("use --" in refusals[0] or "use a machine with" in refusals[0])
        return
    conserved(plan, Footprint(SHAPES[shape], kinds, context, kv_bits), on_gpu=vram != 0)
    within(plan)
    assert plan.predicted_tokens_per_s > 0 and plan.predicted_prefill_tokens_per_s > 0
    assert plan.prompt_chunk == chunk or chunk is None


def test_scout_in_int4_on_a_24_gb_card_plans_above_20_tokens_per_s() -> None:
    recipe = load_recipe("scout-rtx4090")
    plan = make_plan(
        SHAPES["scout"],
        recipe.schemes,
        machine(gpu=RTX_4090),
        vram=recipe.vram,
        ram=recipe.ram,
        context=recipe.context or 0,
    )
    assert plan.predicted_tokens_per_s >= 20
    assert plan.limited_by == "ram bandwidth"
    assert plan.total("disk", "experts_cold") == 0


def test_maverick_leaves_on_disk_what_24_and_64_gb_do_not_hold() -> None:
    plan = make_plan(SHAPES["maverick"], load_recipe("fast").schemes, machine(gpu=RTX_4090))
    assert plan.limited_by == "disk"
    assert plan.vram_slots + plan.ram_slots < plan.experts == 24 * 128
    homes = plan.vram_slots - plan.vram_reserve + plan.ram_slots
    assert plan.hit_rates["disk"] == pytest.approx(1 - homes / plan.experts)


def test_what_every_token_reads_lives_on_the_gpu_and_embeddings_do_not() -> None:
    table = make_plan(SHAPES["scout"], load_recipe("fast").schemes, machine(gpu=RTX_4090)).table()
    assert {"attention", "shared_expert", "lm_head", "norm", "router", "kv_cache", "scratch"} <= table["vram"].keys()
    assert {"embeddings", "framework"} <= table["ram"].keys()
    assert table["disk"].keys() == {"vision"}


def test_a_tied_head_takes_the_embeddings_with_it() -> None:
    tied = SHAPES["tiny, tied head, experts of no whole page"]
    assert "embeddings" in make_plan(tied, {}, machine(gpu=RTX_4090)).table()["vram"]


def test_vram_0_leaves_the_gpu_alone() -> None:
    with_gpu = make_plan(SHAPES["mini-scout"], {}, machine(gpu=RTX_4090), vram=0)
    assert with_gpu == make_plan(SHAPES["mini-scout"], {}, machine())
    assert not with_gpu.table()["vram"]


def test_a_shorter_context_or_smaller_kv_cache_makes_room_for_experts() -> None:
    schemes = load_recipe("mini-scout").schemes
    slots = [
        make_plan(SHAPES["mini-scout"], schemes, machine(), ram=2 * GIB, context=context, kv_bits=bits).ram_slots
        for context, bits in ((16384, 16), (16384, 8), (2048, 16))
    ]
    assert slots == sorted(set(slots))


@pytest.mark.parametrize("gpu", [None, RTX_4090], ids=["no GPU", "RTX 4090"])
def test_one_more_gib_buys_what_a_plan_with_it_predicts(gpu: Gpu | None) -> None:
    shape, schemes = SHAPES["maverick"], load_recipe("fast").schemes
    plan = make_plan(shape, schemes, machine(gpu=gpu), vram=20 * GIB if gpu else None, ram=40 * GIB)
    budgets: dict[str, Any] = {"vram": 20 * GIB if gpu else None, "ram": 40 * GIB}
    assert set(plan.gains) == {"ram", "vram"} if gpu else {"ram"}
    for tier, promised in plan.gains.items():
        more = {**budgets, tier: budgets[tier] + GIB}
        assert make_plan(shape, schemes, machine(gpu=gpu), **more).predicted_tokens_per_s == promised


def test_more_memory_that_changes_nothing_is_not_advertised() -> None:
    assert not make_plan(SHAPES["mini-scout"], load_recipe("mini-scout").schemes, machine()).gains


def test_routing_counts_pin_the_hottest_and_leave_a_window_for_the_rest() -> None:
    shape = SHAPES["scout"]
    counts = [[1000 if expert == 3 else 1 for expert in range(16)] for _ in range(48)]
    plan = make_plan(
        shape, load_recipe("fast").schemes, machine(gpu=RTX_4090), routing=Profile(counts, [[0] * 17] * 48)
    )
    assert set(plan.vram_seeds[:48]) == {(layer, 3) for layer in range(48)}
    assert plan.vram_slots - len(plan.vram_seeds) == plan.vram_reserve == 2
    assert plan.routing_known and plan.hit_rates["vram"] > 0.98
    uniform = make_plan(shape, load_recipe("fast").schemes, machine(gpu=RTX_4090))
    assert uniform.vram_seeds == () and not uniform.routing_known
    assert plan.predicted_tokens_per_s > 1.5 * uniform.predicted_tokens_per_s


def test_an_empty_profile_is_no_profile() -> None:
    nothing = Profile([[0] * 16] * 16, [[0] * 17] * 16)
    plan = make_plan(SHAPES["mini-scout"], {}, machine(), ram=8 * GIB, routing=nothing)
    assert not plan.routing_known
    assert (
        plan.predicted_tokens_per_s
        == make_plan(SHAPES["mini-scout"], {}, machine(), ram=8 * GIB).predicted_tokens_per_s
    )


def test_the_chunk_is_as_asked_or_the_largest_that_costs_little() -> None:
    shape, schemes = SHAPES["mini-scout"], load_recipe("mini-scout").schemes
    assert make_plan(shape, schemes, machine(), prompt_chunk=77).prompt_chunk == 77
    roomy, tight = (make_plan(shape, schemes, machine(), ram=ram, context=4096).prompt_chunk for ram in (16 * GIB, GIB))
    assert roomy == 2048 and 16 <= tight < roomy
    assert make_plan(shape, schemes, machine(), context=100).prompt_chunk <= 100


def refused(shape: str, schemes: Mapping[Role, Scheme], on: Machine, **options: Any) -> str:
    with pytest.raises(BudgetError) as caught:
        make_plan(SHAPES[shape], schemes, on, **options)
    return str(caught.value)


def test_the_ram_that_a_refusal_names_is_enough_and_not_much_more() -> None:
    schemes = load_recipe("mini-scout").schemes
    message = refused("mini-scout", schemes, machine(), ram=300 * 2**20)
    assert "300.00 MiB" in message
    named = re.search(r"use --ram (\S+)", message)
    assert named
    enough = parse_size(named[1])
    make_plan(SHAPES["mini-scout"], schemes, machine(), ram=enough)
    refused("mini-scout", schemes, machine(), ram=enough - 2**20)


def test_every_remedy_of_a_refusal_is_one() -> None:
    schemes: dict[Role, Scheme] = {
        "experts": Scheme("int4"),
        "shared_expert": Scheme("int8"),
        "attention": Scheme("int8"),
    }
    on, asked = machine(gpu=RTX_4090), {"vram": 12 * GIB, "context": 65536}
    message = refused("scout", schemes, on, **asked)
    named = re.search(r"use --vram (\S+) or --context (\d+)", message)
    assert named and "--recipe fast" in message and "--vram 0" in message
    shape = SHAPES["scout"]
    make_plan(shape, schemes, on, vram=parse_size(named[1]), context=65536)
    make_plan(shape, schemes, on, vram=12 * GIB, context=int(named[2]))
    make_plan(shape, load_recipe("fast").schemes, on, **asked)
    make_plan(shape, schemes, on, vram=0, context=65536)
    assert "--kv int8" not in message
    refused("scout", schemes, on, **asked, kv_bits=8)


def test_a_card_too_small_is_refused_with_numbers() -> None:
    small = described_machine("RTX 4060")
    message = refused("maverick", load_recipe("fast").schemes, small, context=8192, kv_bits=8)
    assert re.search(r"needs 8\.\d+ GiB of VRAM .* but its budget is 7\.60 GiB: use ", message)
    assert "--vram 8" not in message  # the card does not have it


def test_with_every_expert_in_vram_no_slot_is_kept_free() -> None:
    server = described_machine("H200")
    plan = make_plan(SHAPES["scout"], load_recipe("fast").schemes, server)
    assert plan.vram_slots == plan.experts and plan.vram_reserve == 0 and plan.hit_rates["vram"] == 1
    tight = make_plan(SHAPES["scout"], load_recipe("fast").schemes, server, vram=24 * GIB)
    assert tight.vram_slots - tight.vram_reserve + tight.ram_slots == tight.experts


def test_a_refusal_names_what_takes_the_room() -> None:
    message = refused("scout", {"experts": Scheme("int4")}, machine(gpu=RTX_4090), vram=8 * GIB)
    assert "shared experts 11.25 GiB" in message and "8.00 GiB" in message


def test_a_budget_beyond_the_machine_is_cut_to_it_and_said() -> None:
    big = make_plan(SHAPES["scout"], load_recipe("fast").schemes, machine(gpu=RTX_4090), vram=48 * GIB, ram=128 * GIB)
    assert big.vram == 24 * GIB and big.ram <= 60 * GIB
    assert [" ".join(note.split()[:3]) for note in big.notes] == ["a VRAM budget", "a RAM budget"]
    sold_as_24 = replace(RTX_4090, vram_bytes=24564 * 2**20)
    plan = make_plan(SHAPES["scout"], load_recipe("fast").schemes, machine(gpu=sold_as_24), vram=24 * GIB)
    assert plan.vram == 24564 * 2**20 and not plan.notes
    no_gpu = make_plan(SHAPES["mini-scout"], {}, machine(), vram=24 * GIB)
    assert "no GPU" in no_gpu.notes[0]


def test_a_plan_is_one_json_document_with_its_predictions_on_top() -> None:
    plan = make_plan(SHAPES["scout"], load_recipe("fast").schemes, machine(gpu=RTX_4090))
    data = json.loads(json.dumps(plan.to_json()))
    assert data["predicted_tokens_per_s"] == plan.predicted_tokens_per_s
    assert data["predicted_prefill_tokens_per_s"] == plan.predicted_prefill_tokens_per_s
    assert data["limited_by"] == plan.limited_by
    assert data["bytes"] == plan.table()


def test_what_no_budget_of_this_machine_holds_is_said_not_offered() -> None:
    with pytest.raises(BudgetError, match=r"use a machine with .* of RAM free") as refused:
        make_plan(SHAPES["scout"], {}, machine(ram=8 * 2**30), vram=0)
    assert "--ram 8" not in str(refused.value).partition("use ")[2]


def test_what_the_gpu_computes_of_a_missed_expert_is_whole_groups() -> None:
    shape, whole = SHAPES["scout"], SHAPES["scout"].expert_intermediate
    schemes: dict[Role, Scheme] = {"experts": Scheme("int4", 128)}

    def rows(machine: Machine, **options: Any) -> int:
        return make_plan(shape, schemes, machine, **options).gpu_rows

    found = {rows(machine(ram=256 * GIB, ram_gb_s=rate, gpu=RTX_4090)) for rate in (20, 70, 200, 400)}
    assert all(count % 128 == 0 and 0 <= count <= whole for count in found) and len(found) > 1
    on_card = machine(ram=256 * GIB, gpu=RTX_4090)
    assert rows(on_card, cold="cpu") == 0 and rows(on_card, cold="pcie") == whole
    assert rows(on_card, vram=0) == rows(machine(ram=256 * GIB)) == 0


@pytest.mark.parametrize(("disk_gb_s", "fits"), [(0.5, True), (6.5, True), (60.0, False)])
def test_tokens_are_guessed_where_the_head_is_read_sooner_than_an_expert(disk_gb_s: float, fits: bool) -> None:
    shape, schemes = SHAPES["mini-scout"], load_recipe("mini-scout").schemes
    on = machine(ram=256 * GIB, ram_gb_s=40, disk_gb_s=disk_gb_s)
    head = shape.role_nbytes(schemes)["lm_head"] / 40
    plan = make_plan(shape, schemes, on)
    assert plan.guess_tokens == fits == (head < plan.slot_bytes / disk_gb_s)
    assert not make_plan(SHAPES["tiny, tied head, experts of no whole page"], schemes, on).guess_tokens


def test_the_gpu_left_alone_is_offered_with_the_ram_that_it_takes() -> None:
    small = described_machine("RTX 4090")
    message = refused("scout", load_recipe("fast").schemes, small, vram=3 * GIB, ram=4 * GIB)
    offered = re.search(r"--vram 0 --ram ([\d.]+GiB) to leave the GPU alone", message)
    assert offered
    shape = ModelShape.from_config(load_shape("scout"))
    make_plan(shape, load_recipe("fast").schemes, small, vram=0, ram=parse_size(offered[1]))


def test_no_context_is_offered_that_the_model_was_not_made_for() -> None:
    shape = replace(ModelShape.from_config(load_shape("scout")), max_position_embeddings=8192)
    with pytest.raises(BudgetError, match=r"--context 8192 \(all that the model was made for\)"):
        make_plan(shape, load_recipe("fast").schemes, described_machine("RTX 4090"), context=50_000_000)


def test_several_sequences_are_predicted_by_the_experts_that_they_share() -> None:
    plan = make_plan(SHAPES["mini-scout"], {"experts": Scheme("int4")}, machine(), ram="16GiB")
    ones, twos, fours, eights = plan.together
    assert [p.n for p in plan.together] == [1, 2, 4, 8]
    assert ones.tokens_per_s == plan.predicted_tokens_per_s
    assert ones.tokens_per_s < twos.tokens_per_s < fours.tokens_per_s < eights.tokens_per_s < 8 * ones.tokens_per_s
    assert [p.experts_per_step / 16 for p in plan.together] == pytest.approx(
        [16 * (1 - (15 / 16) ** n) for n in (1, 2, 4, 8)]
    )


def test_beside_a_gpu_sequences_take_turns() -> None:
    plan = make_plan(SHAPES["scout"], {"experts": Scheme("int4")}, machine(gpu=RTX_4090))
    assert {p.tokens_per_s for p in plan.together} == {plan.predicted_tokens_per_s}


def test_the_kv_cache_has_room_for_as_many_sequences_as_fit_and_the_others_are_said_to_wait() -> None:
    def planned(ram: str, sequences: int) -> Plan:
        return make_plan(SHAPES["mini-scout"], {"experts": Scheme("int4")}, machine(), ram=ram, sequences=sequences)

    one, eight = planned("16GiB", 1), planned("16GiB", 8)
    assert (one.kv_sequences, eight.kv_sequences, eight.notes) == (1, 8, ())
    assert eight.total("ram", "kv_cache") == 8 * one.total("ram", "kv_cache")
    short = planned("2.4GiB", 100)
    assert 1 <= short.kv_sequences < 100
    within(short)
    assert any("others wait" in note for note in short.notes)


def test_a_context_that_nobody_asked_for_takes_what_the_experts_leave() -> None:
    shape, schemes = SHAPES["mini-scout"], load_recipe("fast").schemes
    roomy = make_plan(shape, schemes, machine(), ram=16 * GIB)
    assert roomy.context == shape.max_position_embeddings and roomy.ram_slots == roomy.experts
    whole = make_plan(shape, schemes, machine(), ram=16 * GIB, context=4096).total("ram") - FRAMEWORK_RAM
    between = make_plan(shape, schemes, machine(), ram=whole + GIB // 4)
    assert 4096 < between.context < roomy.context and between.ram_slots == between.experts
    longer = make_plan(shape, schemes, machine(), ram=whole + GIB // 4, context=between.context + 1024)
    assert longer.predicted_tokens_per_s < between.predicted_tokens_per_s


@pytest.mark.parametrize("gpu", [None, RTX_4090], ids=["no GPU", "RTX 4090"])
def test_where_experts_lack_room_no_speed_is_given_for_context_and_its_price_is_said(gpu: Gpu | None) -> None:
    shape, schemes, on = SHAPES["scout"], load_recipe("fast").schemes, machine(gpu=gpu)
    plan, usual = (make_plan(shape, schemes, on, ram=24 * GIB, context=asked, curve=True) for asked in (None, 4096))
    assert plan.predicted_tokens_per_s == usual.predicted_tokens_per_s and plan.context >= 4096
    assert not plan.context_asked and usual.context_asked
    speeds = [one.tokens_per_s for one in usual.contexts]
    assert len(speeds) > 3 and speeds == sorted(speeds, reverse=True) and speeds[-1] < speeds[0]
    for one in usual.contexts:
        again = make_plan(shape, schemes, on, ram=24 * GIB, context=one.context)
        assert one.tokens_per_s == again.predicted_tokens_per_s >= one.full_tokens_per_s
        assert one.kv_bytes == again.total("vram" if gpu else "ram", "kv_cache")


def test_a_context_of_itself_is_no_longer_than_a_model_can_be_trusted_with() -> None:
    config = load_shape("mini-scout")
    scaled = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 5e5}
    for change, most in (({}, 131_072), ({"max_position_embeddings": 2000}, 2000), ({"rope_scaling": scaled}, 4096)):
        shape = ModelShape.from_config({**config, **change})
        assert make_plan(shape, load_recipe("fast").schemes, machine(), ram=16 * GIB).context == most
