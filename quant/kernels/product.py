"""y = x · Wᵀ on a packed weight, in one native call."""

import torch
from torch import Tensor

from quant.kernels.library import call
from quant.kernels.rows import float_rows, output_rows
from quant.kernels.weight import Weight


def linear(x: Tensor, weight: Weight, *, exact: bool = False, out: Tensor | None = None) -> Tensor:
    """y = x · Wᵀ, f32 ``[T, N]``, for x ``[T, K]`` (f32; other float dtypes are converted).

    Against int4 and int8 weights x is rounded to int8 per token and group (scale absmax / 127) unless
    ``exact``, which keeps f32 and is slower; plain weights are always exact. Raises SchemeError if the shapes
    do not fit.
    """
    x = float_rows(x, weight.in_features, "x")
    tokens, n = x.shape[0], weight.out_features
    out = torch.empty(tokens, n, dtype=torch.float32) if out is None else output_rows(out, tokens, n)
    call("linear", weight.native, x, x.stride(0), tokens, out, out.stride(0), exact)
    return out
