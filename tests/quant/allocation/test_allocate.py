"""The allocator against an exact dynamic program, and what it promises its callers."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.allocation.allocate import Choices, Option, allocate
from quant.allocation.units import Unit
from quant.errors import UsageError
from quant.model.tensors import LinearSpec
from quant.scheme import Scheme

SCHEMES = [Scheme.parse(text) for text in ("int4-g128", "int4-g64", "int4-g32", "int8-g128")]


def unit(index: int) -> Unit:
    return Unit("attention", index, "qkv", (LinearSpec(f"layers.{index}.q_proj", "attention", 8, 128, index),))


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Choices], int]:
    choices = []
    for index in range(draw(st.integers(1, 6))):
        sizes = sorted(draw(st.sets(st.integers(1, 12), min_size=1, max_size=4)))
        losses = [draw(st.integers(0, 100)) for _ in sizes]
        options = zip(SCHEMES, sizes, losses, strict=False)
        choices.append(Choices(unit(index), tuple(Option(s, size, float(loss)) for s, size, loss in options)))
    least = sum(choice.options[0].nbytes for choice in choices)
    return choices, least + draw(st.integers(0, 40))


def optimum(choices: list[Choices], budget: int) -> float:
    """The least loss within ``budget``, by trying every size that can be reached."""
    best = {0: 0.0}
    for choice in choices:
        longer: dict[int, float] = {}
        for used, loss in best.items():
            for option in choice.options:
                size = used + option.nbytes
                if size <= budget:
                    longer[size] = min(longer.get(size, float("inf")), loss + option.loss)
        best = longer
    return min(best.values())


@settings(max_examples=300, deadline=None)
@given(problems())
def test_the_budget_is_kept_and_the_loss_is_within_one_step_of_the_best(problem: tuple[list[Choices], int]) -> None:
    choices, budget = problem
    found, best = allocate(choices, budget, "test"), optimum(choices, budget)
    assert found.nbytes <= budget
    largest = max((abs(a.loss - b.loss) for c in choices for a, b in pairwise(c.options)), default=0.0)
    assert best <= found.loss <= best + largest
    assert allocate(choices, budget, "test") == found


@settings(max_examples=100, deadline=None)
@given(problems())
def test_unlimited_bytes_buy_the_least_loss_of_every_unit(problem: tuple[list[Choices], int]) -> None:
    choices, _ = problem
    assert allocate(choices, 10_000, "test").loss == sum(min(o.loss for o in c.options) for c in choices)


def test_bits_go_where_a_byte_saves_most() -> None:
    losses = [(10.0, 9.0), (10.0, 1.0), (5.0, 4.9)]
    choices = [
        Choices(unit(i), (Option(SCHEMES[0], 4, low), Option(SCHEMES[3], 8, high)))
        for i, (low, high) in enumerate(losses)
    ]
    found = allocate(choices, 16, "test")
    assert [str(option.scheme) for _, option in found.chosen] == ["int4-g128", "int8-g128", "int4-g128"]
    assert found.bits == 16 * 8 / (3 * 8 * 128)
    document = found.to_json()
    assert document["units"][1]["scheme"] == "int8-g128" and document["judged_by"] == "test"


def test_too_few_bytes_are_refused_with_what_it_takes() -> None:
    choices = [Choices(unit(0), (Option(SCHEMES[0], 528, 1.0),))]
    with pytest.raises(UsageError, match=r"3\.984 bits per weight .* are too few: .* take 4\.125"):
        allocate(choices, 510, "test")
