"""Sensitivity: what the model's predictions lose when one unit alone is stored in fewer bits.

The text runs through the layers once. For every unit of a layer its schemes are tried, and the change of the
layer's output is taken for each; for the smallest and the largest scheme the changed hidden states go on
through all later layers, which are as they were, and their divergence from the original's predictions is the
unit's loss. Losses of the schemes between follow from their outputs' change, on the power law through those
two. Experts thereby count as often as the text's tokens choose them.

In memory: one layer's experts, and two streams of hidden states per unit (tokens x H x 4 bytes), which is
why long texts are not used whole.

Legend: B windows, T tokens of a window, H hidden, E experts.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from itertools import repeat

import torch
from torch import Tensor

from offload.experts.storage.store import ExpertWeights
from offload.quality.layerwise import Layerwise, check_layers
from quant.allocation.allocate import Choices, Option
from quant.allocation.units import Unit, UnitPart
from quant.checkpoint.checkpoint import Checkpoint
from quant.linear import LinearWeight, QuantLinear
from quant.model.families import PROJECTIONS, Role
from quant.model.tensors import LinearSpec
from quant.progress import Progress, nobody
from quant.rounding.rounding import Rounder
from quant.scheme import Scheme

STREAM_BYTES = 8 * 2**30
_WINDOWS = 4  # at least, however few tokens there is room for
_LEAST_TOKENS, _MOST_TOKENS = 256, 8192
_EXPONENTS = 0.3, 1.2  # of divergence over the output's squared change; two draws can say anything


@dataclass
class _Measured:
    """Of one unit: per scheme the output's squared change ``[E]`` by the token's expert (or ``[1]``), and
    the divergence of those that were followed to the end."""

    changes: dict[Scheme, Tensor] = field(default_factory=dict)
    losses: dict[Scheme, float] = field(default_factory=dict)


def sample_tokens(checkpoint: Checkpoint, units: Sequence[Unit]) -> int:
    """How many tokens the streams of ``units`` have room for."""
    streams = 2 * len(_joined(units))
    room = STREAM_BYTES // (streams * checkpoint.shape.hidden_size * 4)
    return max(_LEAST_TOKENS, min(_MOST_TOKENS, room))


def stream_bytes(checkpoint: Checkpoint, units: Sequence[Unit], tokens: int) -> int:
    """Bytes of all hidden states in flight."""
    return (2 * len(_joined(units)) + 2) * tokens * checkpoint.shape.hidden_size * 4


def sensitivities(
    checkpoint: Checkpoint, units: Sequence[Unit], ids: Tensor, rounder: Rounder, progress: Progress = nobody
) -> list[Choices]:
    """Each unit's schemes with what they are expected to lose: mean KL divergence, over windows spread evenly
    among ``ids`` ``[B, T]``, as many as there is room for.

    Units that are one expert's get their share of what all experts of the layer lose together.
    """
    check_layers(checkpoint.shape, "measuring what bits are worth")
    joint = _joined(units)
    room = sample_tokens(checkpoint, units)
    length = min(ids.shape[1], room // _WINDOWS)
    count = min(len(ids), room // length)
    spread = torch.linspace(0, len(ids) - 1, count).round().long()
    with Layerwise(checkpoint) as walk, torch.inference_mode():
        survey = _Survey(walk, list(joint.values()), ids[spread, :length], rounder)
        progress(0, checkpoint.shape.num_layers, "measuring what bits are worth")
        for layer in range(checkpoint.shape.num_layers):
            survey.layer(layer)
            progress(layer + 1, checkpoint.shape.num_layers, "measuring what bits are worth")
        survey.finish()
    measured = dict(zip(joint, survey.measured, strict=True))
    return [_choices(unit, measured[_key(unit)]) for unit in units]


_Key = tuple[Role, int | None, UnitPart]


def _key(unit: Unit) -> _Key:
    return unit.role, unit.layer, unit.part


def _joined(units: Sequence[Unit]) -> dict[_Key, Unit]:
    """What is measured at once: all experts of a layer, for which the first one's Linears stand."""
    joint: dict[_Key, Unit] = {}
    for unit in units:
        joint.setdefault(_key(unit), replace(unit, expert=None))
    return joint


def _choices(unit: Unit, measured: _Measured) -> Choices:
    schemes = unit.candidates()
    low, high = schemes[0], schemes[-1]
    total = {scheme: float(measured.changes[scheme].sum()) for scheme in schemes}
    exponent = _exponent(measured.losses[low], measured.losses[high], total[low], total[high])
    options = []
    for scheme in schemes:
        loss = measured.losses[low] * (total[scheme] / max(total[low], 1e-30)) ** exponent
        if unit.expert is not None:
            loss *= float(measured.changes[scheme][unit.expert]) / max(total[scheme], 1e-30)
        options.append(Option(scheme, unit.nbytes(scheme), loss))
    return Choices(unit, tuple(options))


def _exponent(low_loss: float, high_loss: float, low_change: float, high_change: float) -> float:
    if not (low_loss > high_loss > 0 and low_change > high_change > 0):
        return 1.0
    found = math.log(low_loss / high_loss) / math.log(low_change / high_change)
    return min(max(found, _EXPONENTS[0]), _EXPONENTS[1])


class _Survey:
    """The text on its way through the layers, and every changed copy of it."""

    def __init__(self, walk: Layerwise, units: Sequence[Unit], ids: Tensor, rounder: Rounder) -> None:
        self.walk, self.units, self.rounder = walk, units, rounder
        self.plain = walk.embed(ids)
        self.streams: dict[tuple[int, Scheme], Tensor] = {}
        self.measured = [_Measured() for _ in units]

    def layer(self, layer: int) -> None:
        """Try this layer's units, and move all streams on."""
        after, routes = self.walk.run_routed(layer, self.plain)
        for stream in self.streams.values():
            self.walk.run(layer, stream, stream)
        for index, unit in enumerate(self.units):
            if unit.layer == layer:
                self._try(index, unit, after, routes if unit.role == "experts" else None)
        self.plain = after

    def _try(self, index: int, unit: Unit, after: Tensor, routes: Tensor | None) -> None:
        assert unit.layer is not None
        schemes = unit.candidates()
        for scheme in schemes:
            with self._stored(unit, scheme):
                changed = self.walk.run(unit.layer, self.plain)
            square = (changed - after).square().sum(-1).flatten()
            if routes is not None:
                each = square / routes.shape[1]
                count = self.walk.shape.num_experts
                by_expert = torch.zeros(count)
                for chosen in routes.t():
                    by_expert.index_add_(0, chosen, each)
                square = by_expert
            else:
                square = square.sum()[None]
            self.measured[index].changes[scheme] = square
            if scheme in (schemes[0], schemes[-1]):
                self.streams[index, scheme] = changed

    def _stored(self, unit: Unit, scheme: Scheme) -> AbstractContextManager[None]:
        """The model with ``unit`` in ``scheme``, inside a ``with`` block."""
        if unit.role == "experts":
            experts = range(self.walk.shape.num_experts)
            return self.walk.runner.set_to(replaced={e: self._expert(unit, e, scheme) for e in experts})
        return self.walk.swapped({linear.module: self._linear(linear, scheme) for linear in unit.linears})

    def _linear(self, linear: LinearSpec, scheme: Scheme) -> QuantLinear:
        plain = self.walk.linear(linear.module)
        return QuantLinear.holding(self._round(linear, plain.weight.data, scheme), self.walk.compute, plain.bias)

    def _expert(self, unit: Unit, expert: int, scheme: Scheme) -> ExpertWeights:
        assert unit.layer is not None
        views = self.walk.checkpoint.expert(unit.layer, expert)
        linears = self.walk.shape.expert_linears(unit.layer, expert)
        weights = (views[name].dense().contiguous() for name in PROJECTIONS)
        return ExpertWeights(*map(self._round, linears, weights, repeat(scheme)))

    def _round(self, linear: LinearSpec, weight: Tensor, scheme: Scheme) -> LinearWeight:
        found = self.rounder.encode(weight, scheme, linear.module, False, linear.module, 0)
        return LinearWeight(scheme, found.tensors, linear.out_features, linear.in_features)

    def finish(self) -> None:
        """Compare every stream's predictions with the original's."""
        losses = dict.fromkeys(self.streams, 0.0)
        heads = [(index, unit) for index, unit in enumerate(self.units) if unit.layer is None]
        for window, hidden in enumerate(self.plain):
            reference = self.walk.log_probs(hidden)
            for key, stream in self.streams.items():
                losses[key] += _divergence(reference, self.walk.log_probs(stream[window]))
            for index, unit in heads:
                self._try_head(index, unit, hidden, reference)
        for (index, scheme), loss in losses.items():
            self.measured[index].losses[scheme] = loss / len(self.plain)
        for index, unit in heads:
            measured = self.measured[index]
            # The head's change is its divergence itself: what it does is what is measured.
            measured.changes = {scheme: torch.tensor([loss]) for scheme, loss in measured.losses.items()}
            for scheme in unit.candidates():
                measured.losses[scheme] /= len(self.plain)

    def _try_head(self, index: int, unit: Unit, hidden: Tensor, reference: Tensor) -> None:
        for scheme in unit.candidates():
            with self._stored(unit, scheme):
                loss = _divergence(reference, self.walk.log_probs(hidden))
            losses = self.measured[index].losses
            losses[scheme] = losses.get(scheme, 0.0) + loss


def _divergence(reference: Tensor, found: Tensor) -> float:
    """Mean KL over tokens ``[T, V]``, in nats."""
    return float((reference.exp() * (reference - found)).sum(-1).mean())
