"""Sensitivity: what is measured is what storing a unit alone does to the model's predictions."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from offload.quality.sensitivity import sensitivities
from quant.allocation.allocate import Choices
from quant.allocation.allocator import Allocator, split_roles
from quant.allocation.estimate import estimates
from quant.allocation.findings import keep_allocation, keep_losses, kept_allocation, kept_losses
from quant.allocation.units import units_of
from quant.checkpoint.checkpoint import Checkpoint
from quant.convert.convert import convert
from quant.errors import BudgetError, UsageError
from quant.model.families import Role
from quant.model.mixed_precision import MixedPrecision
from quant.rounding.rounding import Nearest
from quant.scheme import BF16, Scheme
from tests import oracle

Tiny = Callable[..., Path]
ROLES: list[Role] = ["experts", "shared_expert", "dense_mlp", "attention", "lm_head"]
IDS = torch.randint(0, 240, (3, 64), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def measured(tiny: Tiny) -> list[Choices]:
    checkpoint = Checkpoint.open(tiny("llama4_maverick"))
    return sensitivities(checkpoint, units_of(checkpoint.shape, ROLES), IDS, Nearest())


@pytest.mark.parametrize("name", ["layer 1 experts", "layer 0 attention qkv", "lm_head"])
def test_a_units_loss_is_the_divergence_of_the_model_with_that_unit_stored_alone(
    tiny: Tiny, tmp_path: Path, measured: list[Choices], name: str
) -> None:
    source = tiny("llama4_maverick")
    choices = next(choice for choice in measured if choice.unit.name == name)
    option = choices.options[0]
    alone = {linear.module: option.scheme for linear in choices.unit.linears}
    shape = Checkpoint.open(source).shape
    every = {linear.module: alone.get(linear.module, BF16) for linear in shape.linears()}
    convert(source, tmp_path / "one", MixedPrecision(every, {choices.unit.role: option.scheme}), rounding="rtn")
    with torch.inference_mode():
        ours = torch.log_softmax(oracle.stock(source, tmp_path / "one")(input_ids=IDS).logits.double(), -1)
        theirs = torch.log_softmax(oracle.stock(source, source)(input_ids=IDS).logits.double(), -1)
    expected = float((theirs.exp() * (theirs - ours)).sum(-1).mean())
    assert option.loss == pytest.approx(expected, rel=0.02)


def test_every_unit_is_measured_and_more_bits_lose_less(measured: list[Choices]) -> None:
    assert {choice.unit.role for choice in measured} == set(ROLES)
    for choice in measured:
        losses = [option.loss for option in choice.options]
        assert 0 <= losses[-1] < losses[0] / 4, choice.unit.name
        assert [option.nbytes for option in choice.options] == sorted(o.nbytes for o in choice.options)


def test_an_experts_share_follows_its_tokens(tiny: Tiny) -> None:
    checkpoint = Checkpoint.open(tiny("llama4_text"))
    together = sensitivities(checkpoint, units_of(checkpoint.shape, ["experts"]), IDS[:1], Nearest())
    apart = sensitivities(checkpoint, units_of(checkpoint.shape, ["experts"], "expert"), IDS[:1], Nearest())
    assert len(apart) == 8 * len(together)
    for whole in together:
        parts = [c for c in apart if (c.unit.layer, c.unit.part) == (whole.unit.layer, whole.unit.part)]
        for index, option in enumerate(whole.options):
            losses = [choice.options[index].loss for choice in parts]
            assert sum(losses) == pytest.approx(option.loss, rel=1e-4)
            assert max(losses) > 2 * min(losses)


def test_routed_experts_may_have_fewer_bits_and_what_every_token_reads_may_not(tiny: Tiny) -> None:
    checkpoint = Checkpoint.open(tiny("llama4_maverick"))
    units = units_of(checkpoint.shape, ROLES, least_bits=2)
    assert {unit.candidates()[0].bits for unit in units if unit.role == "experts"} == {2}
    assert {unit.candidates()[0].bits for unit in units if unit.role != "experts"} == {4}
    experts = [unit for unit in units if unit.role == "experts"]
    [choice] = sensitivities(checkpoint, experts[:1], IDS[:1], Nearest())
    losses = {option.scheme.bits: option.loss for option in choice.options}
    assert losses[2] > 2 * losses[3] > 4 * losses[4] > 0


def test_a_speed_is_met_with_the_most_bits_that_meet_it(tiny: Tiny, measured: list[Choices]) -> None:
    made = allocator(tiny("llama4_maverick"), measured)
    most, wanted = made.by_bits(8.125).nbytes, made.by_bits(5.0).nbytes

    def fits(schemes: object) -> bool:
        assert isinstance(schemes, MixedPrecision)
        return sum(s.nbytes(*sizes[m]) for m, s in schemes.modules.items()) <= wanted

    sizes = {x.module: (x.out_features, x.in_features) for x in made.checkpoint.shape.linears()}
    assert 0.9 * wanted < made.by_fit(fits, "9 tokens/s").nbytes <= wanted < most
    with pytest.raises(BudgetError, match="do not fit 9 tokens/s: use --least-bits 3 or 2, --target-bits"):
        made.by_fit(lambda schemes: False, "9 tokens/s")


def test_losses_are_kept_for_the_same_job_only(tmp_path: Path, measured: list[Choices]) -> None:
    units, file = [choice.unit for choice in measured], tmp_path / "work" / "sensitivity.json"
    assert kept_losses(file, {"text": "a"}, units) is None
    keep_losses(file, {"text": "a"}, measured)
    assert kept_losses(file, {"text": "a"}, units) == measured
    assert kept_losses(file, {"text": "b"}, units) is None


def test_a_choice_is_kept_for_the_same_goal_only(tiny: Tiny, tmp_path: Path, measured: list[Choices]) -> None:
    units, file = [choice.unit for choice in measured], tmp_path / "work" / "allocation.json"
    chosen = allocator(tiny("llama4_maverick"), measured).by_bits(5.0)
    keep_allocation(file, {"bits": 5.0, "roles": ("experts",)}, chosen)
    assert kept_allocation(file, {"bits": 5.0, "roles": ("experts",)}, units) == chosen
    assert kept_allocation(file, {"bits": 4.5, "roles": ("experts",)}, units) is None


def allocator(folder: Path, choices: list[Choices]) -> Allocator:
    return Allocator(Checkpoint.open(folder), choices, [], "test")


def test_a_target_in_bits_or_bytes_is_met_and_not_exceeded(tiny: Tiny, tmp_path: Path, measured: list[Choices]) -> None:
    source = tiny("llama4_maverick")
    made = allocator(source, measured)
    for bits in (4.125, 4.5, 5.0, 8.125):
        found = made.by_bits(bits)
        assert bits - 0.25 < found.bits <= bits
        assert len({o.scheme.kind for unit, o in found.chosen if unit.role == "experts"}) == 1
    uneven = Allocator(made.checkpoint, measured, [], "test", uneven=True)
    found = uneven.by_bits(7)
    assert found.loss < made.by_bits(7).loss
    assert {o.scheme.kind for unit, o in found.chosen if unit.role == "experts"} == {"int4", "int8"}
    size = 1_270_000  # a layer of experts is one step, a seventh of this
    report = convert(source, tmp_path / "out", uneven.by_size(size).mixture())
    assert 0.97 * size < report.output_bytes <= size
    with pytest.raises(UsageError, match="the smallest that this checkpoint gets"):
        made.by_size(500_000)
    with pytest.raises(UsageError, match="too few"):
        made.by_bits(4)


def test_what_fits_is_the_best_of_every_cap_on_the_experts(tiny: Tiny, measured: list[Choices]) -> None:
    source = tiny("llama4_maverick")
    made, shape = allocator(source, measured), Checkpoint.open(source).shape
    room = shape.num_experts * len(shape.moe_layers) * shape.expert_nbytes(Scheme("int4", 64))

    def fits(schemes: object) -> bool:
        assert isinstance(schemes, MixedPrecision)
        return shape.largest_expert(schemes) * shape.num_experts * len(shape.moe_layers) <= room

    found = made.by_fit(fits)
    experts = {str(o.scheme) for unit, o in found.chosen if unit.role == "experts"}
    assert "int8-g128" not in experts and "int4-g64" in experts
    assert all(str(o.scheme) == "int8-g128" for unit, o in found.chosen if unit.role == "attention")
    with pytest.raises(BudgetError, match=r"even 4\.125 bits per weight"):
        made.by_fit(lambda schemes: False)


def test_without_a_text_units_are_judged_by_their_weights(tiny: Tiny) -> None:
    checkpoint = Checkpoint.open(tiny("mixtral"))
    units, _ = split_roles(checkpoint, ["experts", "attention"], {}, per_expert=False)
    found = Allocator(checkpoint, estimates(checkpoint, units, Nearest()), [], "test").by_bits(4.5)
    experts = {o.scheme for unit, o in found.chosen if unit.role == "experts"}
    assert len(experts) == 1  # transformers fuses them
    assert any(o.scheme == Scheme("int8") for unit, o in found.chosen if unit.role == "attention")


def test_rarely_used_experts_count_for_less_where_a_profile_says_so(tiny: Tiny) -> None:
    checkpoint = Checkpoint.open(tiny("llama4_text"))
    every = units_of(checkpoint.shape, ["experts"], "expert")
    units = [unit for unit in every if (unit.layer, unit.part) == (0, "all")][:2]
    hot, cold = estimates(checkpoint, units, Nearest(), None, {(0, 0): 0.9, (0, 1): 0.1})
    assert hot.options[0].loss > 5 * cold.options[0].loss
