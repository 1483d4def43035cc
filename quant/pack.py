"""The torch reference of quantization: quantize, pack, unpack, dequantize, byte-exact.

Every kernel is tested against this module; it is written to be read, not to be fast.

Legend: N out features, K in features, G = K / group_size groups, W the dense weight ``[N, K]``.

The scale of a group is ``absmax / 7.5`` (int4), ``absmax / 127.5`` (int8), ``absmax / 3.5`` (int3) or ``absmax / 1.5``
(int2), computed in f32 and rounded to
bf16: compressed-tensors' ``calculate_qparams`` for symmetric integers. Values are rounded half to even
against the *stored* scale, so that what is dequantized is the nearest the format can hold.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant.errors import SchemeError
from quant.scheme import Scheme

_HALF_RANGE = {2: 1.5, 3: 3.5, 4: 7.5, 8: 127.5}


@dataclass(frozen=True)
class Packed:
    """One Linear's weight in ``pack-quantized`` form.

    ``packed`` int32 ``[N, K·bits/32]``, ``scale`` bf16 ``[N, G]``; the packed axis is K.
    """

    scheme: Scheme
    packed: Tensor
    scale: Tensor

    @property
    def out_features(self) -> int:
        return self.packed.shape[0]

    @property
    def in_features(self) -> int:
        return self.packed.shape[1] * 32 // self.scheme.bits

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by checkpoint suffix, ``weight_shape`` included."""
        shape = torch.tensor([self.out_features, self.in_features], dtype=torch.int64)
        return {"weight_packed": self.packed, "weight_scale": self.scale, "weight_shape": shape}


def quantize_absmax(weight: Tensor, scheme: Scheme) -> Packed:
    """Round ``weight`` ``[N, K]`` (any float dtype) to ``scheme``, int2 to int8.

    Raises SchemeError if the groups do not divide K or the weight has NaN or Inf.
    """
    rows, columns = weight.shape
    scheme.check("weight", rows, columns)
    groups = weight.float().reshape(rows, -1, scheme.group_size)  # [N, G, group_size]
    absmax = groups.abs().amax(-1)
    if not torch.isfinite(absmax).all():
        raise SchemeError("weight has NaN or Inf: expected finite values")
    scale = (absmax / _HALF_RANGE[scheme.bits]).bfloat16()
    # A scale that vanishes in bf16 stands for a group of zeros; dividing by it must stay finite.
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    top = 2 ** (scheme.bits - 1)
    values = (groups / scale.float().unsqueeze(-1)).round().clamp(-top, top - 1).to(torch.int8)
    return Packed(scheme, pack(values.reshape(rows, columns), scheme.bits), scale)


def pack(values: Tensor, bits: int) -> Tensor:
    """int8 ``[N, K]`` → int32 ``[N, K·bits/32]``: value + 2^(bits-1), element i of a row at bits ``bits·i``.

    Eight values fill ``bits`` bytes; with 3 bits some of them lie across two words.
    """
    rows, columns = values.shape
    eights = torch.nn.functional.pad(values, (0, -columns % 8)).reshape(rows, -1, 8)
    runs = torch.zeros(eights.shape[:2], dtype=torch.int64, device=values.device)
    for i in range(8):
        runs |= (eights[..., i].to(torch.int64) + 2 ** (bits - 1)) << bits * i
    octets = runs.view(torch.uint8).reshape(rows, -1, 8)[..., :bits]
    words: Tensor = octets.reshape(rows, -1)[:, : columns * bits // 8].contiguous().view(torch.int32)
    return words


def unpack(packed: Tensor, bits: int) -> Tensor:
    """int32 ``[N, K·bits/32]`` → int8 ``[N, K]``, the inverse of ``pack``."""
    octets = packed.contiguous().view(torch.uint8)
    if bits == 8:
        return (octets ^ 128).view(torch.int8)
    if bits == 4:
        return (torch.stack((octets & 15, octets >> 4), -1).flatten(-2).to(torch.int8)) - 8
    runs = sum(octets[:, i::bits].to(torch.int32) << 8 * i for i in range(bits))  # [N, K/8], each with eight values
    assert isinstance(runs, Tensor)
    values = torch.stack([(runs >> bits * i & 2**bits - 1).to(torch.int8) for i in range(8)], -1)
    top: int = 2 ** (bits - 1)
    return values.flatten(-2) - top


def dequantize(weight: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense ``[N, K]`` weight, q · scale rounded to ``dtype``: what compressed-tensors' unpacking
    returns."""
    values = unpack(weight.packed, weight.scheme.bits).to(dtype)
    groups = values.view(weight.out_features, -1, weight.scheme.group_size)
    groups *= weight.scale.to(dtype).unsqueeze(-1)  # in place: one dense copy is in memory
    return values


def quantize_nf4(weight: Tensor) -> dict[str, Tensor]:
    """``weight`` ``[N, K]`` as bitsandbytes' serialized NF4 tensors, by checkpoint suffix (``weight``,
    ``weight.absmax``, ``weight.quant_map``, ``weight.quant_state.bitsandbytes__nf4``)."""
    quiet_bitsandbytes()
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight.contiguous(), blocksize=64, quant_type="nf4", compress_statistics=False)
    tensors = {"weight": packed}
    tensors.update({f"weight.{name}": value for name, value in state.as_dict(packed=True).items()})
    return tensors


def dequantize_nf4(tensors: Mapping[str, Tensor]) -> Tensor:
    """The dense ``[N, K]`` weight of ``quantize_nf4``'s tensors, in the dtype they were quantized from."""
    quiet_bitsandbytes()
    from bitsandbytes.functional import dequantize_4bit

    dense: Tensor = dequantize_4bit(tensors["weight"], nf4_state(tensors))
    return dense


def nf4_state(tensors: Mapping[str, Tensor]) -> Any:
    """What bitsandbytes' functions want to know beside the weight of ``quantize_nf4``'s tensors."""
    from bitsandbytes.functional import QuantState

    parts: dict[str, Any] = {name: value for name, value in tensors.items() if name != "weight"}
    return QuantState.from_dict(parts, device=tensors["weight"].device)


def matmul_nf4(x: Tensor, weight: Tensor, state: Any) -> Tensor:
    """x ``[..., K]`` · Wᵀ → ``[..., N]`` by bitsandbytes: fused for one token, else on the dequantized
    weight."""
    quiet_bitsandbytes()
    from bitsandbytes.autograd._functions import matmul_4bit

    y: Tensor = matmul_4bit(x, weight.t(), quant_state=state)
    return y


def quiet_bitsandbytes() -> None:
    """Keep bitsandbytes from advertising an optional kernel package that Coldstream has no use for."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
