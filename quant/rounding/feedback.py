"""Rounding to given scales with feedback, in one native pass.

Legend: N out features, K in features, G groups along K.
"""

import ctypes

import torch
from torch import Tensor

from quant.errors import SchemeError
from quant.kernels.library import I32, I64, Pointer, addresses, call, fields
from quant.rounding.curvature import BLOCK, Curvature
from quant.rounding.scales import value_range
from quant.scheme import Scheme


class _CFeedbackJob(ctypes.Structure):
    _fields_ = fields(
        (Pointer, "weight scale"), (I64, "n k"), (I32, "group block low high"), (Pointer, "order first again values")
    )


def round_with_feedback(weight: Tensor, scale: Tensor, scheme: Scheme, curvature: Curvature) -> Tensor:
    """int8 values ``[N, K]`` of ``weight`` f32 ``[N, K]`` for bf16 ``scale`` ``[N, G]``, of a packed kind.

    The same for any number of threads. Between instruction sets, and beside
    ``quant.rounding.curvature.round_by``, sums are rounded differently, so that a value on the edge
    between two may take either. Raises SchemeError for tensors that do not belong together.
    """
    n, k = weight.shape
    scheme.check("weight", n, k)
    fits = scale.shape == (n, k // scheme.group_size) and curvature.order.shape == (k,)
    if not fits or weight.dtype is not torch.float32 or scale.dtype is not torch.bfloat16:
        raise SchemeError(
            f"{weight.dtype} {n}x{k} weights, scales {tuple(scale.shape)} {scale.dtype} and a curvature of "
            f"{len(curvature.order)} columns: expected f32, [{n}, {k // scheme.group_size}] bf16 and {k}"
        )
    if not scheme.is_packed:
        raise SchemeError(f"{scheme} cannot be rounded with feedback: expected int2 to int8")
    weight, scale = weight.contiguous(), scale.contiguous()
    values = torch.empty((n, k), dtype=torch.int8)
    low, high = value_range(scheme)
    tensors = addresses(weight=weight, scale=scale, values=values, **vars(curvature))
    call("round", _CFeedbackJob(n=n, k=k, group=scheme.group_size, block=BLOCK, low=low, high=high, **tensors))
    return values
