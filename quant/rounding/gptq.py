"""GPTQ: rounding that makes up for each error in the columns not yet rounded, by what the inputs are like.

Minimizes the error of the product, tr(E H Eᵀ) with E = Ŵ - W and H = XᵀX, a column at a time (Frantar et al.,
2022): the columns still to come take up the error, through the Cholesky factor of H⁻¹. Columns are taken by
falling diagonal of H ("act-order"), but groups stay where they are: scales are found first, so the format is
that of plain rounding. Afterwards scales and values are improved in turn: scales by least squares, values one
column at a time given all others.

``H`` may be paired with ``cross`` = XᵀX̂ for inputs X of the original model and X̂ of the one quantized so
far (H is then X̂ᵀX̂): the weight is first moved to what best gives the original's product from the inputs
that there will be.

Legend: N out features, K in features, G groups along K.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.errors import CheckpointError
from quant.pack import Packed, pack
from quant.rounding.scales import best_scales, value_range
from quant.rounding.search import FRACTIONS
from quant.scheme import Scheme

DAMPING = 0.01  # of the mean diagonal of H
MAX_DAMPING = 1e4
_SWEEPS = 3
_FRACTIONS = {8: (255 / 256, 1.0, 257 / 256), 4: tuple(j / 32 for j in range(21, 36)), 3: FRACTIONS[3], 2: FRACTIONS[2]}


@dataclass(frozen=True)
class Rounded:
    """A weight in stored form, and the ``target`` f32 ``[N, K]`` that it was moved to before it was rounded;
    ``damping`` is what H needed to be positive definite, of its mean diagonal."""

    packed: Packed
    target: Tensor
    damping: float
    squared_sum: float
    squared_error: float


def gptq(weight: Tensor, scheme: Scheme, hessian: Tensor, cross: Tensor | None = None) -> Rounded:
    """Quantize ``weight`` ``[N, K]`` given ``hessian`` f32 ``[K, K]`` (and ``cross``, alike).

    Raises CheckpointError if the Hessian holds NaN or Inf, or stays indefinite under any damping.
    """
    rows, columns = weight.shape
    scheme.check("weight", rows, columns)
    weight = weight.float()
    diagonal = torch.diagonal(hessian)
    mean = float(diagonal.mean())
    if not torch.isfinite(hessian).all():
        raise CheckpointError("a Hessian holds NaN or Inf: the model's activations overflow on this text")
    if mean <= 0:  # no input was ever other than zero: nothing to weigh errors by
        hessian, mean, cross = torch.eye(columns), 1.0, None
    damped, factor, used = _factor(hessian, mean)
    target = weight
    if cross is not None:
        target = weight + weight @ ((cross - hessian) @ torch.cholesky_inverse(torch.linalg.cholesky(damped)))
    scale = best_scales(target, scheme, torch.diagonal(damped), _FRACTIONS[scheme.bits])
    values = _sweep(target, scale, factor, torch.argsort(torch.diagonal(damped), descending=True), scheme)
    scale, values = _improve(target, scale, values, damped, scheme)
    dense = values * scale.float().repeat_interleave(scheme.group_size, 1)
    packed = Packed(scheme, pack(values.to(torch.int8), scheme.bits), scale.to(torch.bfloat16))
    error = float((dense - weight).square().sum(dtype=torch.float64))
    return Rounded(packed, target, used, float(weight.square().sum(dtype=torch.float64)), error)


def _factor(hessian: Tensor, mean: float) -> tuple[Tensor, Tensor, float]:
    """H damped, the upper Cholesky factor of its inverse in act-order, and the damping that it took."""
    order, damping = torch.argsort(torch.diagonal(hessian), descending=True), DAMPING
    while damping <= MAX_DAMPING:
        damped = hessian + damping * mean * torch.eye(len(hessian))
        lower, info = torch.linalg.cholesky_ex(damped[order][:, order])
        if int(info) == 0:
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if int(info) == 0 and torch.isfinite(upper).all():
                return damped, upper, damping
        damping *= 10
    raise CheckpointError(
        "a Hessian is not positive definite under any damping: the model's activations overflow on this text"
    )


def _sweep(weight: Tensor, scale: Tensor, factor: Tensor, order: Tensor, scheme: Scheme) -> Tensor:
    """GPTQ's pass over the columns in ``order``, blocked so that most of its work is matrix products."""
    low, high = value_range(scheme)
    block, columns = 128, weight.shape[1]
    left = weight[:, order].t().contiguous()  # [K, N]: a column is a row
    scales = scale.repeat_interleave(scheme.group_size, 1)[:, order].t().contiguous()
    values = torch.empty_like(left)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        errors = torch.empty(end - start, len(weight))
        for i in range(start, end):
            values[i] = (left[i] / scales[i]).round_().clamp_(low, high)
            error = (left[i] - values[i] * scales[i]) / factor[i, i]
            left[i + 1 : end].addr_(factor[i, i + 1 : end], error, alpha=-1)
            errors[i - start] = error
        left[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    result = torch.empty_like(values)
    result[order] = values
    return result.t().contiguous()


def _improve(weight: Tensor, scale: Tensor, values: Tensor, hessian: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scales by least squares given the values, then values one column at a time given the rest, in turn."""
    low, high = value_range(scheme)
    size = scheme.group_size
    groups = weight.shape[1] // size
    for _ in range(_SWEEPS):
        for group in range(groups):
            part = slice(group * size, (group + 1) * size)
            dense = values * scale.repeat_interleave(size, 1)
            pull = ((weight - dense) @ hessian[:, part] * values[:, part]).sum(1)
            curve = (values[:, part] @ hessian[part, part] * values[:, part]).sum(1)
            better = (scale[:, group] + pull / curve.clamp_min(1e-30)).to(torch.bfloat16).float()
            usable = (curve > 0) & torch.isfinite(better) & (better != 0)
            scale = scale.clone()
            scale[:, group] = torch.where(usable, better, scale[:, group])
        scales = scale.repeat_interleave(size, 1).t().contiguous()
        error = (weight.t() - values.t() * scales).contiguous()
        pulls = hessian @ error
        chosen = values.t().contiguous()
        for i in range(len(chosen)):
            wanted = chosen[i] + pulls[i] / (hessian[i, i] * scales[i])
            better = wanted.round_().clamp_(low, high)
            moved = (chosen[i] - better) * scales[i]
            chosen[i] = better
            if moved.any():
                pulls.addr_(hessian[i], moved)
        values = chosen.t().contiguous()
    return scale, values
