"""Scales of groups, found by trying fractions of the largest magnitude.

Legend: N out features, K in features, G groups along K.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from quant.scheme import Scheme


def value_range(scheme: Scheme) -> tuple[int, int]:
    """The lowest and the highest value of a packed kind."""
    top: int = 2 ** (scheme.bits - 1)
    return -top, top - 1


def best_scales(weight: Tensor, scheme: Scheme, importance: Tensor, fractions: Sequence[float]) -> Tensor:
    """Per group f32 ``[N, G]``, exact in bf16 and of either sign: of those that make the largest magnitude so many
    ``fractions`` of the range, the one with the least squared error of ``weight`` f32 ``[N, K]``, each column weighted
    by ``importance`` ``[K]``."""
    low, high = value_range(scheme)
    groups = weight.reshape(len(weight), -1, scheme.group_size)
    weights = importance.view(-1, scheme.group_size)
    step = (groups.abs().amax(-1) / -low).clamp_min(2.0**-100)
    scale, least = step, torch.full_like(step, torch.inf)
    for fraction in fractions:
        for sign in (1.0, -1.0):
            tried = (step * (fraction * sign)).to(torch.bfloat16).float()
            missed = (groups / tried.unsqueeze(-1)).round_().clamp_(low, high)
            missed.mul_(tried.unsqueeze(-1)).sub_(groups)
            error = missed.square_().mul_(weights).sum(-1)
            better = error < least
            least, scale = torch.where(better, error, least), torch.where(better, tried, scale)
    return scale
