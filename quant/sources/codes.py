"""Codes of fp8 and of GGUF's commonest types to f32 by native code, the bits that torch and the ``gguf`` package give.

Legend: R rows, K columns.
"""

import ctypes

import torch
from torch import Tensor

from quant.errors import SchemeError
from quant.kernels.library import I32, I64, Pointer, addresses, call, fields

_CODES: dict[str, tuple[int, int, int]] = {  # number in kernels.h, values of a block, its bytes
    "F8_E4M3": (0, 1, 1),
    "Q8_0": (1, 32, 34),
    "Q4_K": (2, 256, 144),
    "Q5_K": (3, 256, 176),
    "Q6_K": (4, 256, 210),
}


class _CCodesJob(ctypes.Structure):
    _fields_ = fields((Pointer, "codes factors out"), (I64, "rows columns width"), (I32, "kind"))


def is_native(kind: str) -> bool:
    """Whether ``widened`` knows codes of this kind."""
    return kind in _CODES


def widened(codes: Tensor, kind: str, factors: Tensor | None = None, width: int = 1) -> Tensor:
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
