"""Units: the Linears that must share a scheme, and what schemes they may have.

Loaders fuse q, k and v, and gate_proj and up_proj, so these are stored alike. A layer's routed experts are
one unit, all three projections of them: vLLM reads one scheme per layer and refuses a layer whose projections
differ, and experts that are stored alike are computed in one native call, and in one launch on a GPU. Each
expert is a unit of its own where that is asked for. Routed experts may have fewer bits than what every token reads:
down to ``least_bits``, which is 4 unless somebody asks for less.

Legend: E experts.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from quant.model.families import Role
from quant.model.shape import ModelShape
from quant.model.tensors import LinearSpec
from quant.scheme import LEAST_BITS, Scheme

UnitPart = Literal["qkv", "o", "gate_up", "down", "all"]
Granularity = Literal["layer", "expert"]
_FEW = ("int2-g64", "int2-g32", "int3-g128", "int3-g64")
CANDIDATES = tuple(  # by rising size
    Scheme.parse(text) for text in (*_FEW, "int4-g128", "int4-g64", "int4-g32", "int8-g128", "int8-g64", "int8-g32")
)
_PARTS: Mapping[str, UnitPart] = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "o_proj": "o", "down_proj": "down"}


@dataclass(frozen=True)
class Unit:
    """``linears`` share a scheme of ``least_bits`` or more. ``layer`` is None for the head; ``expert`` is None for what
    is no routed expert, and for all experts of a layer together."""

    role: Role
    layer: int | None
    part: UnitPart
    linears: tuple[LinearSpec, ...]
    expert: int | None = None
    least_bits: int = LEAST_BITS

    @property
    def name(self) -> str:
        """For tables and messages: ``layer 3 experts gate_up``."""
        where = "" if self.layer is None else f"layer {self.layer} "
        which = "" if self.expert is None else f" {self.expert}"
        return f"{where}{self.role}{which}" + ("" if self.part == "all" else f" {self.part}")

    @property
    def weights(self) -> int:
        return sum(linear.weights for linear in self.linears)

    def nbytes(self, scheme: Scheme) -> int:
        """Bytes of the unit under ``scheme``."""
        return sum(scheme.nbytes(linear.out_features, linear.in_features) for linear in self.linears)

    def candidates(self) -> tuple[Scheme, ...]:
        """The schemes whose groups divide every Linear of the unit; of int8, where small groups buy next to
        nothing, the one with the largest."""
        widths = {linear.in_features for linear in self.linears}
        wide_enough = (s for s in CANDIDATES if s.bits >= self.least_bits)
        fitting = [s for s in wide_enough if all(width % s.group_size == 0 for width in widths)]
        return tuple(s for s in fitting if s.is_coarse or s == _largest_int8(fitting))


def _largest_int8(schemes: Sequence[Scheme]) -> Scheme:
    return max((s for s in schemes if s.kind == "int8"), key=lambda s: s.group_size)


def units_of(
    shape: ModelShape, roles: Sequence[Role], granularity: Granularity = "layer", least_bits: int = LEAST_BITS
) -> list[Unit]:
    """The units of ``roles`` in model order; routed experts may have ``least_bits``, the others 4."""
    grouped: dict[tuple[Role, int | None, UnitPart, int | None], list[LinearSpec]] = {}
    for linear in _linears(shape, roles):
        expert = linear.expert if granularity == "expert" else None
        key = (linear.role, linear.layer, _part(linear), expert)
        grouped.setdefault(key, []).append(linear)
    return [
        Unit(role, layer, part, tuple(linears), expert, least_bits if role == "experts" else LEAST_BITS)
        for (role, layer, part, expert), linears in grouped.items()
    ]


def _linears(shape: ModelShape, roles: Sequence[Role]) -> Iterator[LinearSpec]:
    yield from (linear for linear in shape.linears() if linear.role in roles)


def _part(linear: LinearSpec) -> UnitPart:
    if linear.role in ("lm_head", "experts"):
        return "all"
    return _PARTS.get(linear.module.rpartition(".")[2], "gate_up")
