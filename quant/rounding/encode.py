"""One block of a dense weight as the bytes of its stored tensors, and what the rounding cost.

Packed kinds go through the native kernel, which is tested bit for bit against ``quant.pack``; with a
curvature it finds the scales only, and values are rounded with feedback. nf4 goes through bitsandbytes, some
rows at a time, because its CPU code needs many times the weight's size.

Legend: N out features, K in features.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.errors import NonFiniteError
from quant.kernels.quantize import quantize_pack
from quant.pack import dequantize_nf4, pack, quantize_nf4
from quant.rounding.curvature import Curvature
from quant.rounding.feedback import round_with_feedback
from quant.scheme import Scheme

_NF4_WEIGHTS = 2**20
_FEEDBACK_WEIGHTS = 2**22


@dataclass(frozen=True)
class Encoded:
    """Contiguous tensors by checkpoint suffix; sums of squares of the weights and of the rounding errors."""

    tensors: Mapping[str, Tensor]
    squared_sum: float = 0.0
    squared_error: float = 0.0


def encode_weight(
    weight: Tensor,
    scheme: Scheme,
    name: str,
    transposed: bool = False,
    *,
    search: bool = False,
    means: Tensor | None = None,
) -> Encoded:
    """Store ``weight`` ``[N, K]`` (``[K, N]`` where ``transposed``; rows may be strided) under ``scheme``.

    ``search`` and ``means`` are the native quantizer's. ``name`` is what an error calls the weight. Raises
    NonFiniteError if it holds NaN or Inf.
    """
    if not scheme.is_packed:
        dense = (weight.t() if transposed else weight).contiguous()
        check_finite(dense, name)
        return _encode_nf4(dense) if scheme.kind == "nf4" else Encoded({"weight": dense})
    if weight.dtype is torch.float64:
        weight = weight.float()
    done = quantize_pack(weight, scheme.kind, scheme.group_size, transposed, search=search, means=means)
    if not done.finite:
        check_finite(weight, name)
    return Encoded({"weight_packed": done.packed, "weight_scale": done.scale}, done.squared_sum, done.squared_error)


def encode_by(weight: Tensor, scheme: Scheme, name: str, transposed: bool, curvature: Curvature) -> Encoded:
    """As ``encode_weight`` for packed kinds (scales searched, but for int8), values rounded with feedback by
    ``curvature``, some rows at a time."""
    dense = weight.t() if transposed else weight
    check_finite(dense, name)
    packed, scales, signal, noise = [], [], 0.0, 0.0
    for part in dense.split(max(64, _FEEDBACK_WEIGHTS // dense.shape[1])):
        source = part.float().contiguous()
        scale = quantize_pack(source, scheme.kind, scheme.group_size, search=scheme.is_coarse).scale
        values = round_with_feedback(source, scale, scheme, curvature)
        signal += _squares(source)
        groups = values.view(len(values), -1, scheme.group_size)
        noise += _squares((groups * scale.float().unsqueeze(-1)).view_as(source).sub_(source))
        packed.append(packed_words(values, scheme.bits))
        scales.append(scale)
    return Encoded({"weight_packed": torch.cat(packed), "weight_scale": torch.cat(scales)}, signal, noise)


def _squares(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dim=1).square_().sum(dtype=torch.float64))


def packed_words(values: Tensor, bits: int) -> Tensor:
    """``quant.pack.pack`` without its wide temporaries: int8 ``[N, K]`` → int32 ``[N, K·bits/32]``."""
    if bits < 4:
        return pack(values, bits)
    octets = values.view(torch.uint8)
    if bits == 4:
        octets = octets.add(8)
        return (octets[:, ::2] | octets[:, 1::2] << 4).contiguous().view(torch.int32)
    return octets.bitwise_xor(128).view(torch.int32)


def check_finite(tensor: Tensor, name: str) -> None:
    """Raise NonFiniteError, counting them, if ``tensor`` holds NaN or Inf."""
    if not tensor.is_floating_point() or tensor.itemsize == 1:
        return
    # A sum is finite only if every term is, and costs a fraction of looking at each.
    if torch.isfinite(tensor.sum(dtype=torch.float32)):
        return
    nan, inf = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    if nan or inf:
        raise NonFiniteError(
            f"{name} has {nan:,} NaN and {inf:,} infinite values: expected finite weights; download the "
            "shard again, "
            "or the model is broken at its source"
        )


def _encode_nf4(dense: Tensor) -> Encoded:
    if dense.dtype is torch.float64:
        dense = dense.float()
    rows, columns = dense.shape
    step = max(64, _NF4_WEIGHTS // columns // 64 * 64)  # 64 rows never cut a block of 64 weights
    blocks = [quantize_nf4(dense[row : row + step]) for row in range(0, rows, step)]
    signal = noise = 0.0
    for row, block in zip(range(0, rows, step), blocks, strict=True):
        source = dense[row : row + step].float()
        error = dequantize_nf4(block).float() - source
        signal += float(source.square().sum(dtype=torch.float64))
        noise += float(error.square().sum(dtype=torch.float64))
    tensors = {name: torch.cat([block[name] for block in blocks]) for name in ("weight", "weight.absmax")}
    return Encoded(tensors, signal, noise)
