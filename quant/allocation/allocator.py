"""How many bits each unit of a checkpoint gets: what is known of it, the budget, and the choice.

Three goals: mean bits of the quantized weights, bytes of the whole checkpoint, or a machine that must hold
every expert in VRAM and RAM. For that goal the experts' largest scheme is chosen, too.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from quant.allocation.allocate import Allocation, Choices, Option, allocate
from quant.allocation.units import Unit, units_of
from quant.checkpoint.checkpoint import Checkpoint
from quant.convert.parts import plan_conversion
from quant.errors import BudgetError, UsageError
from quant.model.families import ROLE_NAMES, Role
from quant.scheme import LEAST_BITS, Scheme
from quant.sizes import format_size

_ROUNDING = 1e-3  # as the largest is printed
_STEPS = 12  # of halving, towards the largest size that fits
Fits = Callable[[Mapping[Role, Scheme]], bool]


@dataclass(frozen=True)
class Allocator:
    """Chooses for ``choices``; ``fixed`` units keep the scheme they were given, and count towards sizes.

    A slot in VRAM has room for the largest expert, so one layer of int8 experts would double the memory
    that all others take: unless ``uneven``, all of them have the same width.
    """

    checkpoint: Checkpoint
    choices: Sequence[Choices]
    fixed: Sequence[tuple[Unit, Scheme]]
    how: str
    uneven: bool = False

    def by_bits(self, bits: float) -> Allocation:
        """At most ``bits`` per weight that is chosen for, scales counted. Raises UsageError if there are too
        few, or more than the widest schemes take."""
        weights = sum(choice.unit.weights for choice in self.choices)
        least, most = (
            sum(best(option.nbytes for option in choice.options) for choice in self.choices) * 8 / weights
            for best in (min, max)
        )
        if bits > most + _ROUNDING:
            raise UsageError(
                f"{bits:g} bits per weight are more than any scheme to choose from has: expected "
                f"{least:.3f} to {most:.3f}; name the roles that are to stay whole, for "
                "example --attention bf16"
            )
        return self._allocate(self.choices, int(bits * weights / 8))

    def by_size(self, nbytes: int) -> Allocation:
        """A checkpoint of at most ``nbytes`` bytes. Raises UsageError if it cannot be that small."""
        least = self._least(self.choices)
        rest = self._stored(least) - least.nbytes
        if rest + least.nbytes > nbytes:
            raise UsageError(
                f"the smallest that this checkpoint gets is {format_size(rest + least.nbytes)}, "
                f"{format_size(rest)} of it not to be allocated, but {format_size(nbytes)} were asked for: "
                "ask for more, or leave more roles to be allocated"
            )
        found = self._allocate(self.choices, nbytes - rest)
        while (over := self._stored(found) - nbytes) > 0:  # headers are whole pages: some may have grown
            found = self._allocate(self.choices, max(found.nbytes - over, least.nbytes))
        return found

    def _stored(self, allocation: Allocation) -> int:
        """Bytes of the whole checkpoint."""
        return plan_conversion(self.checkpoint, allocation.mixture(self.fixed)).layout.nbytes

    def by_fit(self, fits: Fits, wanted: str = "with every expert in memory") -> Allocation:
        """The least loss whose schemes ``fits``. Raises BudgetError if nothing does what is ``wanted``."""
        found: list[Allocation] = []
        for capped in self._caps():
            least, most = self._least(capped), self._most(capped)
            if not fits(least.mixture(self.fixed)):
                continue
            if fits(most.mixture(self.fixed)):
                found.append(most)
                continue
            best, low, high = least, least.nbytes, most.nbytes
            for _ in range(_STEPS):
                middle = (low + high) // 2
                tried = self._allocate(capped, middle)
                if fits(tried.mixture(self.fixed)):
                    best, low = tried, middle
                else:
                    high = middle
            found.append(best)
        if not found:
            least = self._least(self.choices)
            raise BudgetError(
                f"even {least.bits:.3f} bits per weight ({format_size(least.nbytes)}) do not fit {wanted}: use "
                f"{self._remedy()}--target-bits or --target-size, and the disk holds the cold experts"
            )
        return min(found, key=lambda one: one.loss)

    def _remedy(self) -> str:
        """What lets experts be smaller, if anything does."""
        least = min((c.unit.least_bits for c in self.choices if c.unit.role == "experts"), default=2)
        return f"--least-bits {' or '.join(str(bits) for bits in range(least - 1, 1, -1))}, " if least > 2 else ""

    def _allocate(self, choices: Sequence[Choices], budget: int) -> Allocation:
        """The best of what the experts may be together: of one width, unless ``uneven``; of one scheme where
        transformers loads them as one, in every family but Llama 4."""
        fused = self.checkpoint.shape.merges_experts or not self.checkpoint.shape.is_native
        if self.uneven and not fused:
            return allocate(choices, budget, self.how)
        routed = [choice for choice in choices if choice.unit.role == "experts"]
        schemes = {option.scheme for choice in routed for option in choice.options}
        alike = {str(scheme) if fused else scheme.kind for scheme in schemes}
        found: list[Allocation] = []
        for one in sorted(alike):
            narrowed = list(_narrowed(choices, partial(_is_called, one)))
            if self._floor(narrowed) <= budget:
                found.append(allocate(narrowed, budget, self.how))
        if not found:
            return allocate(choices, budget, self.how)  # nothing to choose, or for its refusal
        return min(found, key=lambda allocation: allocation.loss)

    @staticmethod
    def _floor(choices: Sequence[Choices]) -> int:
        return sum(min(option.nbytes for option in choice.options) for choice in choices)

    def _least(self, choices: Sequence[Choices]) -> Allocation:
        return self._allocate(choices, self._floor(choices))

    def _most(self, choices: Sequence[Choices]) -> Allocation:
        return self._allocate(choices, sum(max(o.nbytes for o in choice.options) for choice in choices))

    def _caps(self) -> Iterator[list[Choices]]:
        """The choices with the experts' schemes up to each size."""
        sizes = {o.scheme.bits_per_weight for c in self.choices if c.unit.role == "experts" for o in c.options}
        for size in sorted(sizes) or [0.0]:
            yield list(_narrowed(self.choices, partial(_is_within, size)))


def _is_called(name: str, option: Option) -> bool:
    return name in (str(option.scheme), option.scheme.kind)


def _is_within(bits: float, option: Option) -> bool:
    return option.scheme.bits_per_weight <= bits


def _narrowed(choices: Sequence[Choices], keeps: Callable[[Option], bool]) -> Iterator[Choices]:
    """``choices`` whose routed experts have those options only that ``keeps`` says."""
    for choice in choices:
        if choice.unit.role == "experts":
            yield replace(choice, options=tuple(option for option in choice.options if keeps(option)))
        else:
            yield choice


def split_roles(
    checkpoint: Checkpoint,
    open_roles: Sequence[Role],
    fixed: Mapping[Role, Scheme],
    per_expert: bool,
    least_bits: int = LEAST_BITS,
) -> tuple[list[Unit], list[tuple[Unit, Scheme]]]:
    """The units to choose for, and those of ``fixed`` roles with their scheme. Raises UsageError if there is
    nothing to choose, or a fixed scheme has no place beside the chosen ones."""
    units = units_of(checkpoint.shape, open_roles, "expert" if per_expert else "layer", least_bits)
    if not units:
        raise UsageError("nothing to choose bits for: leave at least one role of the model to be allocated")
    for role, scheme in fixed.items():
        if scheme.kind == "nf4":
            raise UsageError(f"nf4 ({ROLE_NAMES[role]}) has no place beside int4 and int8: choose another scheme")
    kept = [
        (unit, scheme)
        for role, scheme in fixed.items()
        if scheme.is_packed
        for unit in units_of(checkpoint.shape, [role])
    ]
    return units, kept
