"""Linears that read the same input as one: a GPU reads three small weights slower than one as large."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quant.kernels.cuda import linear as kernels
from quant.linear import QuantLinear


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
        joined = QuantLinear(
            sum(rows), first.in_features, first.scheme, first.compute, bias=first.bias is not None
        )
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
        tensors, scheme = linear.stored.tensors, linear.scheme
        kernels.linear(
            x, tensors["weight_packed"], tensors["weight_scale"], scheme.bits, scheme.group_size, out
        )
    else:
        out.add_(linear(x))
