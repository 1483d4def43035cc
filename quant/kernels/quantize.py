"""Float weights to packed int2, int3, int4 or int8 in one native pass, and others' codes to floats.

Legend: N out features, K in features, G groups along K, R rows.

The same arithmetic as the torch reference, to the bit: scale = bf16(absmax / 1.5) for int2, 3.5 for int3, 7.5 for
int4, 127.5 for int8 (1.0 where that is zero), q = round_half_even(w / scale) clamped to the kind's range. With
``search``, that of ``quant.rounding.search``. Of codes the floats are, bit for bit, those that torch makes of fp8 and
the ``gguf`` package of its types.
"""

import ctypes
import math
from typing import NamedTuple

import torch
from torch import Tensor

from quant.errors import SchemeError
from quant.kernels.library import F64, I32, I64, Pointer, addresses, call, fields
from quant.kernels.weight import CODES
from quant.scheme import GROUP_SIZES, PACKED, Kind, Scheme

_SOURCES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_CODES: dict[str, tuple[int, int, int]] = {  # number in kernels.h, values of a block, its bytes
    "F8_E4M3": (0, 1, 1),
    "Q8_0": (1, 32, 34),
    "Q4_K": (2, 256, 144),
    "Q5_K": (3, 256, 176),
    "Q6_K": (4, 256, 210),
}


class _CQuantizeJob(ctypes.Structure):
    _fields_ = fields(
        (Pointer, "source"),
        (I32, "source_type kind group transposed"),
        (I64, "n k stride"),
        (Pointer, "packed scale"),
        (I32, "search"),
        (Pointer, "means"),
    )


class _CQuantizeStats(ctypes.Structure):
    _fields_ = fields((I64, "nonfinite"), (F64, "squared_error squared_sum"))


class Quantized(NamedTuple):
    """Packed int32 words ``[N, K·bits/32]``, bf16 scales ``[N, G]``, and what the pass met.

    ``finite`` is False if the source held a NaN or an infinity: then the packed values mean nothing.
    """

    packed: Tensor
    scale: Tensor
    finite: bool
    squared_error: float
    squared_sum: float

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise in decibels; infinite when nothing was lost."""
        if self.squared_error == 0:
            return math.inf
        return 10 * math.log10(self.squared_sum / self.squared_error) if self.squared_sum else -math.inf


def quantize_pack(
    source: Tensor,
    kind: Kind,
    group_size: int,
    transposed: bool = False,
    *,
    search: bool = False,
    means: Tensor | None = None,
) -> Quantized:
    """Quantize bf16, fp16 or f32 weights ``[N, K]``, or ``[K, N]`` if ``transposed``, per group.

    ``search`` (not int8) looks for each group's best scale and balances rounding against ``means`` (int32
    ``[K]`` in -127..127), see ``quant.rounding.search``. The source may be a slice with a row stride of
    its own; its columns must be adjacent. Raises SchemeError for what cannot be packed, MachineError if the
    kernels are missing.
    """
    if kind not in PACKED.values() or group_size not in GROUP_SIZES:
        raise SchemeError(f"{kind} with groups of {group_size} cannot be packed: expected int2 to int8, {GROUP_SIZES}")
    if source.dtype not in _SOURCES or source.device.type != "cpu" or source.dim() != 2:
        raise SchemeError(
            f"a {source.dim()}-D {source.dtype} tensor on {source.device} cannot be packed: "
            "expected bf16, fp16 or f32, two dimensions, on the CPU"
        )
    n, k = (source.shape[1], source.shape[0]) if transposed else source.shape
    if k % group_size or not n or not k:
        raise SchemeError(f"{n}x{k} weights cannot be packed: groups of {group_size} do not divide {k}")
    if means is not None and (means.dtype != torch.int32 or means.shape != (k,) or not search):
        raise SchemeError(f"means of shape {tuple(means.shape)} {means.dtype}: expected int32 [{k}], for a search")
    if search and kind == "int8":
        raise SchemeError(f"{kind} has no searched scales: expected int2 to int4")
    means = None if means is None else means.contiguous()
    if source.stride(1) != 1 and source.shape[1] > 1:
        source = source.contiguous()
    packed = torch.empty((n, k * Scheme(kind, group_size).bits // 32), dtype=torch.int32)
    scale = torch.empty((n, k // group_size), dtype=torch.bfloat16)
    tensors = addresses(source=source, packed=packed, scale=scale, means=means)
    job = _CQuantizeJob(n=n, k=k, stride=source.stride(0), **tensors)
    job.source_type, job.kind, job.group = _SOURCES[source.dtype], CODES[kind], group_size
    job.transposed, job.search = transposed, search
    stats = _CQuantizeStats()
    call("quantize", job, stats)
    return Quantized(packed, scale, stats.nonfinite == 0, stats.squared_error, stats.squared_sum)


class _CCodesJob(ctypes.Structure):
    _fields_ = fields((Pointer, "codes factors out"), (I64, "rows columns width"), (I32, "kind"))


def knows_codes(kind: str) -> bool:
    """Whether ``widen_codes`` takes codes of this kind."""
    return kind in _CODES


def widen_codes(codes: Tensor, kind: str, factors: Tensor | None = None, width: int = 1) -> Tensor:
    """Rows of codes, uint8 ``[R, bytes]``, as f32 ``[R, K]``. Those in fp8 are multiplied by ``factors`` f32
    ``[R, ceil(K / width)]``. Raises SchemeError for what does not fit together."""
    number, values, size = _CODES[kind]
    rows, row_bytes = codes.shape
    columns = row_bytes // size * values
    wanted = None if kind != "F8_E4M3" else (rows, -(-columns // width))
    found = None if factors is None else tuple(factors.shape)
    if codes.dtype != torch.uint8 or row_bytes % size or not columns or found != wanted:
        raise SchemeError(
            f"{kind} codes {tuple(codes.shape)} {codes.dtype} with factors {found}: expected uint8, whole blocks of "
            f"{size} bytes, factors {wanted}"
        )
    codes, factors = codes.contiguous(), None if factors is None else factors.float().contiguous()
    out = torch.empty((rows, columns))
    if rows:
        job = _CCodesJob(**addresses(codes=codes, factors=factors, out=out), rows=rows, columns=columns)
        job.width, job.kind = width, number
        call("widen_codes", job)
    return out
