"""Tuning of rounded weights: gradient descent on a layer's output, after GPTQ has rounded Linear by Linear.

GPTQ rounds one Linear at a time and does not see how the errors of several add up in the layer's output. Tuning
brings that output nearer to the original layer's, given the inputs that come from the quantized layers before it. It
changes values and scales of the layer's dense Linears (quant.rounding.learned_rounding); experts, router and norms
stay as they are.

The loss is the squared error of each token's output, relative to the original's mean square: the layers after it
normalize their input, so only its direction matters to them. After the last layer the loss is the divergence of the
predictions, and a little of their loss on the text itself (Hinton et al., 2015, mix the two when one model learns
from another). Every eighth window is held out; a layer whose loss on those does not fall stays as it was.

Legend: B windows, T tokens of a window, H hidden.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from offload.experts.storage.store import ExpertWeights
from quant.checkpoint.checkpoint import Checkpoint
from quant.errors import InputError
from quant.linear import LinearWeight
from quant.model.families import PROJECTIONS
from quant.rounding.learned_rounding import TrainableWeight

BATCH = 4  # windows of a step
_KEPT = 8  # one window of so many is kept back
_VALUE_RATE, _SCALE_RATE = 0.01, 3e-4  # of a rounding step, and of a scale, per step of Adam
_BETAS = (0.9, 0.99)
TRUTH = 0.1  # what the text's own loss counts beside the divergence, after the last layer
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # found, wanted, which windows


def plain_experts(checkpoint: Checkpoint, layer: int) -> dict[int, ExpertWeights]:
    """The routed experts of ``layer`` as the checkpoint has them, in a form that gradients pass."""
    made: dict[int, ExpertWeights] = {}
    for expert in range(checkpoint.shape.num_experts):
        views = checkpoint.expert(layer, expert)
        made[expert] = ExpertWeights(*(LinearWeight.plain(views[name].dense()) for name in PROJECTIONS))
    return made


def tune(
    latents: Sequence[TrainableWeight],
    forward: Callable[[Tensor], Tensor],
    inputs: Tensor,
    target: Tensor,
    passes: int,
    loss_of: Loss | None = None,
) -> tuple[float, float]:
    """Move ``latents`` so that ``forward`` of ``inputs`` ``[B, T, H]`` comes nearer to ``target``, alike: by
    ``loss_of`` the two and the windows' numbers, a mean over windows, or their relative squared error.

    ``passes`` over the windows, in an order that depends on nothing but their number; the rates fall to zero
    along half a cosine. Returns the loss on the windows kept back, before and after: what has come no
    nearer there is better left as it was stored. Raises InputError for a single window.
    """
    loss_of = loss_of or _relative
    order = torch.Generator().manual_seed(0)
    kept = torch.arange(len(inputs)) % _KEPT == _KEPT - 1
    if not kept.any():
        kept[-1] = True
    rows = (~kept).nonzero().squeeze(1)
    size = min(BATCH, len(rows))
    if not size:
        raise InputError("a text of one window leaves nothing to tune on: expected two at least")
    batches = len(rows) // size
    held = kept.nonzero().squeeze(1)
    before = _error(forward, loss_of, inputs, target, held)
    adam = torch.optim.Adam(
        [
            {"params": [latent.values for latent in latents], "lr": _VALUE_RATE},
            {"params": [latent.factors for latent in latents], "lr": _SCALE_RATE},
        ],
        betas=_BETAS,
    )
    steps = passes * batches
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    with torch.enable_grad():
        for _ in range(passes):
            mixed = rows[torch.randperm(len(rows), generator=order)]
            for batch in mixed[: batches * size].split(size):
                loss = loss_of(forward(inputs[batch]), target[batch], batch)
                adam.zero_grad(set_to_none=True)
                loss.backward()
                adam.step()
                schedule.step()
    return before, _error(forward, loss_of, inputs, target, held)


def _relative(found: Tensor, wanted: Tensor, rows: Tensor) -> Tensor:
    return ((found - wanted).square() / wanted.square().mean(-1, keepdim=True).clamp_min(1e-30)).mean()


@torch.no_grad()
def _error(forward: Callable[[Tensor], Tensor], loss_of: Loss, inputs: Tensor, target: Tensor, kept: Tensor) -> float:
    parts = [loss_of(forward(inputs[rows]), target[rows], rows) * len(rows) for rows in kept.split(BATCH)]
    return float(sum(parts, torch.zeros(()))) / len(kept)
