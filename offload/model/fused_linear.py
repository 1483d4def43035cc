"""Linears that read the same input as one: a GPU reads three small weights slower than one as large."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from quant.kernels.cuda import linear as kernels
from quant.linear import QuantLinear

LEAST_WEIGHT = 1e-4  # of a norm's channel that still tells what came in


def join(linears: Sequence[Any]) -> QuantLinear | None:
    """One Linear with the rows of ``linears`` in turn, or None if they are not stored alike.

    The parameters of ``linears`` become views of its own, so that nothing is held twice.
    """
    first = linears[0]
    if any(type(linear) is not QuantLinear for linear in linears):
        return None
    kinds = {(linear.scheme, linear.in_features, _parameters(linear)) for linear in linears}
    if len(kinds) > 1:
        return None
    rows = [linear.out_features for linear in linears]
    with torch.device("meta"):
        joined = QuantLinear(sum(rows), first.in_features, first.scheme, first.compute, bias=first.bias is not None)
    for name, _ in _parameters(first):
        whole = torch.cat([getattr(linear, name).data for linear in linears])
        setattr(joined, name, nn.Parameter(whole, requires_grad=False))
        for linear, part in zip(linears, whole.split(rows), strict=True):
            getattr(linear, name).data = part
    return joined


def _parameters(linear: QuantLinear) -> tuple[tuple[str, torch.dtype], ...]:
    return tuple((name, parameter.dtype) for name, parameter in linear.named_parameters())


def add_product(linear: Any, x: Tensor, out: Tensor) -> None:
    """out f32 ``[T, N]`` += ``linear`` (x ``[T, K]``), in one kernel where the weight is packed."""
    if type(linear) is QuantLinear and linear.scheme.is_packed and linear.bias is None:
        kernels.cuda_linear(x, linear.stored.packed, out)
    else:
        out.add_(linear(x))


def routers_with_next(routers: Sequence[tuple[Tensor, Tensor]], hints: bool, device: torch.device) -> list[Tensor]:
    """Routers f32 ``[E, H]`` on ``device``, from those and the weights ``[H]`` of the norms before them.

    With ``hints`` every one but the last is ``[2E, H]``: below it lies the next layer's, for the same input,
    which its own layer's norm has weighted. (A norm's factor is positive and changes no order of logits.)
    """
    plain = [router.to(device=device, dtype=torch.float32) for router, _ in routers]
    if not hints:
        return plain
    norms = [norm.to(device=device, dtype=torch.float32) for _, norm in routers]
    stacked = []
    for (here, following), (norm, its_norm) in zip(pairwise(plain), pairwise(norms), strict=True):
        weights = torch.where(norm.abs() > LEAST_WEIGHT, its_norm / norm, 0)
        stacked.append(torch.cat((here, following * weights)))
    return [*stacked, plain[-1]]
