"""A weight where it lies: addresses of packed words and scales, for the native kernels to read in place.

Legend: N out features, K in features, G groups along K.
"""

import ctypes
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from quant.errors import SchemeError
from quant.kernels.library import I32, I64, Pointer, fields
from quant.scheme import GROUP_SIZES, PACKED, Kind

NativeKind = Kind | Literal["f32", "f16"]  # of which nf4 is refused
CODES: dict[NativeKind, int] = {"int4": 0, "int8": 1, "bf16": 2, "f32": 3, "f16": 4, "int3": 5, "int2": 6}
_BITS: dict[NativeKind, int] = {kind: bits for bits, kind in PACKED.items()}
_PLAIN: dict[NativeKind, torch.dtype] = {"bf16": torch.bfloat16, "f32": torch.float32, "f16": torch.float16}


class CWeight(ctypes.Structure):
    """``coldstream::Weight`` of kernels.h."""

    _fields_ = fields((I32, "kind group"), (I64, "n k"), (Pointer, "packed scale"), (I64, "pitch"))


@dataclass(frozen=True)
class Weight:
    """One Linear's weight by address: packed int32 words ``[N, K·bits/32]`` and bf16 scales
    ``[N, G]``, or plain bf16, f16 or f32 rows ``[N, K]`` with ``scale_ptr`` 0 and ``group_size`` 0.

    Addresses need 4-byte alignment (scales: 2). Whoever makes a Weight keeps the memory alive while it is
    used; ``owner`` is a place to hold on to it.
    """

    kind: NativeKind
    group_size: int
    out_features: int
    in_features: int
    packed_ptr: int
    scale_ptr: int = 0
    owner: object = None

    def __post_init__(self) -> None:
        if self.kind not in CODES:
            raise SchemeError(f"native kernels know no {self.kind!r}: expected one of {', '.join(CODES)}")
        shape = f"{self.out_features}x{self.in_features} {self.kind}"
        if self.out_features < 1 or self.in_features < 1 or not self.packed_ptr:
            raise SchemeError(f"an empty {shape} weight: expected rows, columns and an address")
        if self.kind in _BITS:
            if self.group_size not in GROUP_SIZES or self.in_features % self.group_size or not self.scale_ptr:
                raise SchemeError(
                    f"a {shape} weight in groups of {self.group_size}: expected a scale for each group of "
                    f"{', '.join(map(str, GROUP_SIZES))} that divides {self.in_features}"
                )
            if self.packed_ptr % 4 or self.scale_ptr % 2:
                raise SchemeError(f"a {shape} weight at an odd address: expected a multiple of 4 (scales: of 2)")
        fields = (CODES[self.kind], self.group_size, self.out_features, self.in_features)
        object.__setattr__(self, "_native", CWeight(*fields, self.packed_ptr, self.scale_ptr or None))

    @property
    def native(self) -> CWeight:
        """The structure that a native call takes."""
        made: CWeight = self.__dict__["_native"]
        return made

    @classmethod
    def from_tensors(cls, kind: NativeKind, packed: Tensor, scale: Tensor | None = None) -> Self:
        """The weight that lies in ``packed`` int32 and ``scale`` bf16 ``[N, G]``, or in the plain matrix
        ``packed`` (bf16, f16 or f32); the tensors are kept alive. Raises SchemeError if they do not fit ``kind``.
        """
        expected = (torch.int32, torch.bfloat16) if kind in _BITS else (_PLAIN.get(kind), None)
        found = (packed.dtype, None if scale is None else scale.dtype)
        tensors = [packed] if scale is None else [packed, scale]
        if found != expected or any(t.dim() != 2 or not t.is_contiguous() or t.is_cuda for t in tensors):
            what = " and ".join(f"{tuple(t.shape)} {t.dtype}" for t in tensors)
            raise SchemeError(f"{what} is no {kind} weight: expected contiguous CPU matrices of {expected}")
        n, k = packed.shape[0], packed.shape[1] * 32 // _BITS.get(kind, 32)
        if scale is None:
            return cls(kind, 0, n, k, packed.data_ptr(), 0, packed)
        groups = scale.shape[1]
        if scale.shape[0] != n or not groups or k % groups:
            raise SchemeError(f"scales {tuple(scale.shape)} do not fit a {n}x{k} {kind} weight: expected [{n}, G]")
        return cls(kind, k // groups, n, k, packed.data_ptr(), scale.data_ptr(), (packed, scale))
