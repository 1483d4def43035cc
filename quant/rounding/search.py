"""Rounding without data: the torch reference of a search for each group's scale, and of rounding that keeps
sums.

The format is symmetric, -8..7 for int4 (-4..3 for int3, -2..1 for int2), so that one side reaches a level further. A
scale may be negative, which puts that level on the other side (llama.cpp's Q4_0 does the same). For each group the
scale is taken, among fractions of absmax and both signs, that leaves the least squared error.

Then rounding is *balanced*. A layer norm's output has a mean per channel, and what rounding does to a row's
product with it is the same for every token: a bias. With ``means`` m (small integers proportional to it), all
weights of a group are moved by theta * m before rounding, with theta such that the errors' sum weighted by m
vanishes. Those nearest to a rounding boundary change side, so it costs the least squared error possible
(theta is the Lagrange multiplier of that constraint).

Everything after the first product is integer arithmetic in 1/256 of a step: sums do not depend on their
order, and the kernel gives the same bits whatever its vectors' width.

Legend: N out features, K in features, G groups along K.
"""

import torch
from torch import Tensor

from quant.errors import SchemeError
from quant.pack import Packed, pack
from quant.scheme import Scheme

UNIT = 256  # fixed point: parts of a step
# Scales tried by bits, as parts of absmax / 8 (4, 2): fewer levels clip more.
FRACTIONS = {
    bits: tuple(j / 32 for j in range(*ends)) for bits, ends in {4: (21, 35), 3: (16, 37), 2: (12, 41)}.items()
}
LEAST_STEP = 2.0**-100
THETA_BITS, MAX_THETA, MAX_SHIFT, ROUNDS = 12, 2**19, 96, 3
MAX_MEAN = 127


def search(weight: Tensor, scheme: Scheme, means: Tensor | None = None) -> Packed:
    """Quantize ``weight`` ``[N, K]`` to int2, int3 or int4 by the best scale per group, balanced against ``means``
    (int32 ``[K]`` in -127..127; None: not balanced). Raises SchemeError if the scheme does not fit or is
    another."""
    rows, columns = weight.shape
    scheme.check("weight", rows, columns)
    if not scheme.is_coarse:
        raise SchemeError(f"{scheme} has no searched scales: expected int2 to int4")
    size, bits = scheme.group_size, scheme.bits
    groups = weight.float().reshape(rows, -1, size)
    absmax = groups.abs().amax(-1)
    step = (absmax * 2.0 ** (1 - bits)).clamp_min(LEAST_STEP)
    least = torch.full_like(step, torch.inf)
    scale = torch.ones_like(step)
    for fraction in FRACTIONS[bits]:
        for sign in (1.0, -1.0):
            tried = (step * (fraction * sign)).to(torch.bfloat16).float()
            fixed = _fixed(groups, tried)
            missed = fixed - _rounded(fixed, bits) * UNIT
            error = missed.square().sum(-1).float() * (tried / step).square()
            better = error < least
            least, scale = torch.where(better, error, least), torch.where(better, tried, scale)
    fixed = _fixed(groups, scale)
    if means is not None:
        fixed = fixed + _balance(fixed, means.view(-1, size), bits)
    values = _rounded(fixed, bits).to(torch.int8).reshape(rows, columns)
    scale = torch.where(absmax == 0, torch.ones_like(scale), scale)
    return Packed(scheme, pack(values, scheme.bits), scale.to(torch.bfloat16))


def _fixed(groups: Tensor, scale: Tensor) -> Tensor:
    """``groups`` ``[N, G, size]`` in 1/256 of a step, int32."""
    product = groups * (float(UNIT) / scale).unsqueeze(-1)
    return product.round().to(torch.int32)


def _rounded(fixed: Tensor, bits: int) -> Tensor:
    top: int = 2 ** (bits - 1)
    return ((fixed + UNIT // 2) >> 8).clamp(-top, top - 1)


def _balance(fixed: Tensor, means: Tensor, bits: int) -> Tensor:
    """What to add to ``fixed`` ``[N, G, size]`` so that its rounding errors' sum weighted by ``means`` ``[G,
    size]`` is as near to zero as Newton's method comes in a few rounds."""
    norm = means.to(torch.int64).square().sum(-1).clamp_min(1)
    theta = torch.zeros(fixed.shape[:2], dtype=torch.int64)
    best, least = theta, torch.full_like(theta, 2**62)
    for done in range(ROUNDS + 1):
        missed = fixed - _rounded(fixed + _shift(theta, means), bits) * UNIT
        bias = (missed * means).sum(-1)
        better = bias.abs() < least
        least, best = torch.where(better, bias.abs(), least), torch.where(better, theta, best)
        if done < ROUNDS:
            theta = theta + torch.div(bias << THETA_BITS, norm, rounding_mode="trunc")
            theta = theta.clamp(-MAX_THETA, MAX_THETA)
    return _shift(best, means)


def _shift(theta: Tensor, means: Tensor) -> Tensor:
    moved = (theta.to(torch.int32).unsqueeze(-1) * means) >> THETA_BITS
    return moved.clamp(-MAX_SHIFT, MAX_SHIFT)
