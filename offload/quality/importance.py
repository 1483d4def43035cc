"""The importance matrix of a text: mean squares of every Linear's input channels, and the directions that
inputs mostly lie along.

One walk through the layers of the original model. A routed expert is measured with its own tokens and with a sample
of all tokens of its layer, which counts most where few were routed to it.

In memory: one layer's experts and the hidden states (tokens x H x 8 bytes).

Legend: T tokens, H hidden, K in features, k experts per token.
"""

from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor

from offload.quality.layerwise import Layerwise, check_layers
from offload.quality.windows import Windows
from quant.checkpoint.checkpoint import Checkpoint
from quant.progress import Progress, nobody
from quant.rounding.imatrix import ChannelMoments, Imatrix

_SAMPLE = 256  # tokens that stand for all of a layer
_OWN = 2048  # tokens of its own that an expert's down_proj is measured with at most
_KEPT = 512  # tokens that directions are taken from
_DIRECTIONS = 32
_SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


class _Inputs:
    """What is seen of one input: sums over all tokens, and some of the tokens."""

    def __init__(self) -> None:
        self.square: Tensor | None = None
        self.tokens = 0.0
        self.kept: list[Tensor] = []

    def add(self, x: Tensor, weight: float = 1.0, every: int = 1) -> None:
        """``x`` f32 ``[T, K]``, each token counting ``weight``; one in ``every`` is kept."""
        square = weight * x.square().sum(0)
        self.square = square if self.square is None else self.square + square
        self.tokens += weight * len(x)
        self.kept.append(x[::every] * weight**0.5)

    def moments(self) -> ChannelMoments:
        """The directions are those of the kept tokens, by the eigenvectors of their products."""
        assert self.square is not None
        square, x = self.square / self.tokens, torch.cat(self.kept)
        x = x[torch.linspace(0, len(x) - 1, min(len(x), _KEPT)).long()]
        # As much power as all tokens have.
        x = x * (square.sum() / x.square().sum().clamp_min(1e-30)).sqrt()
        return ChannelMoments(square, _principal(x))


def _principal(x: Tensor) -> Tensor:
    """The first principal directions ``[R, K]`` of ``x`` ``[T, K]``, as long as the root of their power."""
    tokens, width = x.shape
    values, vectors = torch.linalg.eigh(x.t() @ x if width <= tokens else x @ x.t())
    count = min(_DIRECTIONS, len(values))
    values, vectors = values[-count:], vectors[:, -count:]
    if width <= tokens:
        along: Tensor = (vectors * values.clamp_min(0).sqrt()).t()
    else:
        along = (vectors * (values > 1e-6 * values[-1])).t() @ x
    return along.contiguous()


def measure_importance(checkpoint: Checkpoint, windows: Windows, progress: Progress = nobody) -> Imatrix:
    """The moments of every Linear's input in ``checkpoint`` over ``windows``."""
    check_layers(checkpoint.shape, "measuring importance")
    found: dict[str, ChannelMoments] = {}
    with Layerwise(checkpoint) as walk, torch.inference_mode():
        hidden = walk.embed(windows.ids)
        progress(0, checkpoint.shape.num_layers, "measuring inputs")
        for layer in range(checkpoint.shape.num_layers):
            found.update(_layer(walk, layer, hidden))
            progress(layer + 1, checkpoint.shape.num_layers, "measuring inputs")
        head = [spec for spec in checkpoint.shape.dense_linears() if spec.layer is None]
        if head:
            sums = _Inputs()
            for window in hidden:
                sums.add(walk.model.model.norm(window).float(), every=len(hidden))
            found[head[0].module] = sums.moments()
    return Imatrix(found, windows.identity, checkpoint.identity)


def _layer(walk: Layerwise, layer: int, hidden: Tensor) -> dict[str, ChannelMoments]:
    """Measure ``layer`` and move ``hidden`` on."""
    specs = [spec for spec in walk.shape.dense_linears() if spec.layer == layer]
    first = {spec.module: _first(spec.module) for spec in specs}
    sums = {module: _Inputs() for module in first.values()}
    every = max(1, hidden[..., 0].numel() // _KEPT)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def observe(x: Tensor, chosen: Tensor, scores: Tensor) -> None:
        seen.append((x.float(), chosen, scores.float()))

    with ExitStack() as stack:
        for module, inputs in sums.items():
            stack.enter_context(walk.watched(module, partial(inputs.add, every=every)))
        stack.enter_context(walk.runner.set_to(observer=observe))
        walk.run(layer, hidden, hidden)
    measured = {module: one.moments() for module, one in sums.items()}
    found = {module: measured[other] for module, other in first.items()}
    if seen:
        x, chosen, scores = (torch.cat(parts) for parts in zip(*seen, strict=True))
        found.update(_experts(walk, layer, x, chosen, scores))
    return found


def _first(module: str) -> str:
    """The Linear whose inputs stand for ``module``'s: q_proj for k_proj and v_proj, gate_proj for up_proj."""
    base, _, name = module.rpartition(".")
    return f"{base}.{_SAME_INPUT.get(name, name)}"


def _experts(walk: Layerwise, layer: int, x: Tensor, chosen: Tensor, scores: Tensor) -> dict[str, ChannelMoments]:
    sample = torch.linspace(0, len(x) - 1, min(_SAMPLE, len(x))).long()
    found: dict[str, ChannelMoments] = {}
    scale = float(scores.mean()) if walk.runner.scales_input else 1.0
    for expert in range(walk.shape.num_experts):
        rows, place = (chosen == expert).nonzero(as_tuple=True)
        factor = scores[rows, place][:, None] if walk.runner.scales_input else 1.0
        own, all_ = x[rows] * factor, x[sample] * scale
        weight = min(1.0, 0.1 * max(len(own), 1) / len(all_))  # a tenth of what its own tokens count
        views = walk.checkpoint.expert(layer, expert)
        gate, up = views["gate_proj"].dense().float(), views["up_proj"].dense().float()
        inputs, middle = _Inputs(), _Inputs()
        for tokens, count in ((own, 1.0), (all_, weight)):
            if len(tokens):
                inputs.add(tokens, count, every=max(1, len(tokens) // _KEPT))
                few = tokens[:: max(1, len(tokens) // _OWN)]
                gated = torch.nn.functional.silu(few @ gate.t()) * (few @ up.t())
                middle.add(gated, count * len(tokens) / len(few), every=max(1, len(few) // _KEPT))
        before, between = inputs.moments(), middle.moments()
        for spec in walk.shape.expert_linears(layer, expert):
            found[spec.module] = between if spec.projection == "down_proj" else before
    return found
