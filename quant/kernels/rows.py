"""Tensors as the native calls take them: f32 rows with adjacent columns."""

import torch
from torch import Tensor

from quant.errors import SchemeError


def float_rows(x: Tensor, features: int, name: str) -> Tensor:
    """``x`` as f32 ``[T, features]`` with adjacent columns; raises SchemeError if it is not that shape."""
    if x.dim() != 2 or x.shape[1] != features or x.device.type != "cpu":
        raise SchemeError(f"{name} is {tuple(x.shape)} on {x.device}: expected [tokens, {features}] on the CPU")
    x = x.float()
    return x if x.stride(1) == 1 else x.contiguous()


def output_rows(out: Tensor, tokens: int, features: int) -> Tensor:
    """``out`` itself; raises SchemeError unless it is f32 ``[tokens, features]`` with adjacent columns."""
    fits = out.shape == (tokens, features) and out.dtype == torch.float32 and out.device.type == "cpu"
    if not fits or out.stride(1) != 1:
        raise SchemeError(f"out is {tuple(out.shape)} {out.dtype}: expected f32 {(tokens, features)} rows")
    return out
