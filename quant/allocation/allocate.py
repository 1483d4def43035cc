"""One scheme for each unit, so that the least is lost within a budget of bytes.

A multiple-choice knapsack. On each unit's lower convex hull of (bytes, loss) every step up has a gain per
byte; taking steps of all units by falling gain per byte is optimal for every budget that it hits exactly
(Lagrangian relaxation: the gain at which it stops is the multiplier). What is left of the budget is spent on
single steps and exchanges of two units that still help. The result is at most one step's gain from optimal.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from quant.allocation.units import Unit
from quant.errors import UsageError
from quant.model.mixed_precision import MixedPrecision
from quant.scheme import Scheme
from quant.sizes import format_size

_EXCHANGES = 64  # units up to which pairs of them are tried: with more, little is left over


@dataclass(frozen=True)
class Option:
    """A scheme that a unit may have, its bytes, and what it is expected to cost in divergence."""

    scheme: Scheme
    nbytes: int
    loss: float


@dataclass(frozen=True)
class Choices:
    """A unit and its options by rising size."""

    unit: Unit
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Allocation:
    """A scheme for every unit. ``loss`` is the expected divergence; ``how`` says what it was judged by."""

    choices: tuple[Choices, ...]
    picked: tuple[int, ...]
    how: str

    @property
    def chosen(self) -> list[tuple[Unit, Option]]:
        """Every unit with its option."""
        return [(c.unit, c.options[i]) for c, i in zip(self.choices, self.picked, strict=True)]

    @property
    def nbytes(self) -> int:
        return sum(option.nbytes for _, option in self.chosen)

    @property
    def weights(self) -> int:
        return sum(choice.unit.weights for choice in self.choices)

    @property
    def bits(self) -> float:
        """Mean bits of the allocated weights, scales counted."""
        return self.nbytes * 8 / self.weights

    @property
    def loss(self) -> float:
        return sum(option.loss for _, option in self.chosen)

    def mixture(self, fixed: Sequence[tuple[Unit, Scheme]] = ()) -> MixedPrecision:
        """The schemes by Linear, those of ``fixed`` units among them."""
        pairs = [(unit, option.scheme) for unit, option in self.chosen] + list(fixed)
        return MixedPrecision.of((linear, scheme) for unit, scheme in pairs for linear in unit.linears)

    def to_json(self) -> dict[str, Any]:
        return {
            "judged_by": self.how,
            "bits": round(self.bits, 4),
            "bytes": self.nbytes,
            "expected_loss": self.loss,
            "units": [
                {
                    "role": unit.role,
                    "layer": unit.layer,
                    "part": unit.part,
                    "expert": unit.expert,
                    "scheme": str(option.scheme),
                    "bytes": option.nbytes,
                    "loss": option.loss,
                    "loss_at_least_bits": choice.options[0].loss,
                }
                for choice, (unit, option) in zip(self.choices, self.chosen, strict=True)
            ],
        }


def allocate(choices: Sequence[Choices], budget: int, how: str) -> Allocation:
    """The options of least loss whose bytes are at most ``budget``. The same input gives the same result.

    Raises UsageError if not even the smallest fit, with the size they take.
    """
    hulls = [_hull(choice.options) for choice in choices]
    picked = [hull[0] for hull in hulls]
    used = sum(choice.options[i].nbytes for choice, i in zip(choices, picked, strict=True))
    if used > budget:
        weights = sum(choice.unit.weights for choice in choices)
        raise UsageError(
            f"{budget * 8 / weights:.3f} bits per weight ({format_size(budget)}) are too few: the smallest "
            f"schemes take {used * 8 / weights:.3f} ({format_size(used)}); ask for that or more"
        )
    steps = sorted(
        (-_gain(choices[u].options, a, b), rank, u, a, b)
        for u, hull in enumerate(hulls)
        for rank, (a, b) in enumerate(pairwise(hull))
    )
    for _, _, unit, before, after in steps:
        options = choices[unit].options
        more = options[after].nbytes - options[before].nbytes
        if picked[unit] == before and used + more <= budget:
            picked[unit], used = after, used + more
    _spend(choices, picked, budget - used)
    return Allocation(tuple(choices), tuple(picked), how)


def _hull(options: Sequence[Option]) -> list[int]:
    """Indices of the lower convex hull of (bytes, loss), from the smallest to the one of least loss."""
    order = sorted(range(len(options)), key=lambda i: (options[i].nbytes, options[i].loss))
    hull: list[int] = []
    for i in order:
        if hull and options[i].loss >= options[hull[-1]].loss:
            continue
        while len(hull) > 1 and _gain(options, hull[-2], hull[-1]) <= _gain(options, hull[-1], i):
            hull.pop()
        hull.append(i)
    return hull


def _gain(options: Sequence[Option], before: int, after: int) -> float:
    """Loss that is saved per byte."""
    more = options[after].nbytes - options[before].nbytes
    return (options[before].loss - options[after].loss) / max(more, 1)


def _spend(choices: Sequence[Choices], picked: list[int], left: int) -> None:
    """Improve ``picked`` with ``left`` bytes: single units first, then pairs of which one gives way."""
    while True:
        move = _best_single(choices, picked, left)
        if move is None and len(choices) <= _EXCHANGES:
            move = _best_pair(choices, picked, left)
        if move is None:
            return
        for unit, option in move:
            left += choices[unit].options[picked[unit]].nbytes - choices[unit].options[option].nbytes
            picked[unit] = option


_Move = list[tuple[int, int]]


def _moves(choices: Sequence[Choices], picked: Sequence[int]) -> list[tuple[int, float, int, int]]:
    """(bytes more, loss saved, unit, option) of every other option of every unit."""
    found = []
    for unit, choice in enumerate(choices):
        now = choice.options[picked[unit]]
        for index, option in enumerate(choice.options):
            if index != picked[unit]:
                found.append((option.nbytes - now.nbytes, now.loss - option.loss, unit, index))
    return found


def _best_single(choices: Sequence[Choices], picked: Sequence[int], left: int) -> _Move | None:
    fitting = [move for move in _moves(choices, picked) if move[0] <= left and move[1] > 0]
    if not fitting:
        return None
    _, _, unit, option = max(fitting, key=lambda move: (move[1], -move[2], -move[3]))
    return [(unit, option)]


def _best_pair(choices: Sequence[Choices], picked: Sequence[int], left: int) -> _Move | None:
    moves = _moves(choices, picked)
    best, least = None, 1e-12 * sum(choice.options[0].loss for choice in choices)
    downs = [move for move in moves if move[0] < 0]
    for more, saved, unit, option in moves:
        if more <= 0 or saved <= 0:
            continue
        for less, lost, other, lower in downs:
            if other != unit and more + less <= left and saved + lost > least:
                best, least = [(unit, option), (other, lower)], saved + lost
    return best
