"""What units lose in each scheme, estimated from the weights alone, without a text.

A unit's loss is the mean squared relative error of its Linears, from some rows of each, or of their outputs where an
importance matrix is given. Equal errors are taken to do equal harm in every unit, which is not so, but what a unit
does to predictions cannot be known without a text. A routed expert counts by how often it is used: as a routing
profile says, else all alike.

Legend: N out features, K in features.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from quant.allocation.allocate import Choices, Option
from quant.allocation.units import Unit
from quant.checkpoint.checkpoint import Checkpoint
from quant.linear import LinearWeight
from quant.model.tensors import LinearSpec
from quant.rounding.imatrix import Imatrix
from quant.rounding.rounding import Rounder, Search
from quant.scheme import Scheme

_ROWS = 128  # of each Linear
_EXPERTS = 4  # of each layer, where they are one unit
Shares = Mapping[tuple[int, int], float]


def estimates(
    checkpoint: Checkpoint,
    units: Sequence[Unit],
    rounder: Rounder,
    imatrix: Imatrix | None = None,
    shares: Shares | None = None,
) -> list[Choices]:
    """Each unit's schemes with their loss. ``shares`` gives the part of a layer's requests that goes to each
    (layer, expert)."""
    if isinstance(rounder, Search):  # judged by the error of weights, see its unimagined()
        rounder = rounder.unimagined()
    return [_choices(checkpoint, unit, rounder, imatrix, shares) for unit in units]


def _choices(
    checkpoint: Checkpoint, unit: Unit, rounder: Rounder, imatrix: Imatrix | None, shares: Shares | None
) -> Choices:
    share = 1.0
    if unit.expert is not None and unit.layer is not None:
        known = shares.get((unit.layer, unit.expert)) if shares else None
        share = 1 / checkpoint.shape.num_experts if known is None else known
    sampled = list(_sampled(unit))
    losses = dict.fromkeys(unit.candidates(), 0.0)
    for linear in sampled:
        rows = _rows(checkpoint, linear)
        for scheme in losses:
            losses[scheme] += _error(linear, rows, scheme, rounder, imatrix) / len(sampled)
    return Choices(unit, tuple(Option(s, unit.nbytes(s), share * loss) for s, loss in losses.items()))


def _sampled(unit: Unit) -> Sequence[LinearSpec]:
    experts = sorted({linear.expert for linear in unit.linears if linear.expert is not None})
    if len(experts) <= _EXPERTS:
        return unit.linears
    chosen = {experts[i * len(experts) // _EXPERTS] for i in range(_EXPERTS)}
    return [linear for linear in unit.linears if linear.expert in chosen]


def _rows(checkpoint: Checkpoint, linear: LinearSpec) -> Tensor:
    """The first rows of a Linear ``[N', K]``."""
    if linear.expert is not None:
        assert linear.layer is not None and linear.projection is not None
        view = checkpoint.expert(linear.layer, linear.expert)[linear.projection]
        return view.dense()[:_ROWS].contiguous()
    entry = checkpoint.find(f"{linear.module}.weight")
    return checkpoint.read(entry.key, 0, (min(_ROWS, entry.shape[0]), *entry.shape[1:]))


def _error(linear: LinearSpec, rows: Tensor, scheme: Scheme, rounder: Rounder, imatrix: Imatrix | None) -> float:
    """The squared relative error of the weights, or of what they put out."""
    found = rounder.encode(rows, scheme, linear.module, False, linear.module, 0)
    moments = imatrix.moments.get(linear.module) if imatrix else None
    if moments is None:
        return found.squared_error / max(found.squared_sum, 1e-30)
    source = rows.float()
    missed = LinearWeight(scheme, found.tensors, *rows.shape).dense(torch.float32) - source
    return float(moments.cost(missed).sum()) / max(float(moments.cost(source).sum()), 1e-30)
