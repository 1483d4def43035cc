"""Where an expert's six tensors lie, counted from one address: all that a kernel needs to read it in place.

A slot of the arena is the image of the expert on disk, and it may begin with bytes of a neighbour (reads are
whole pages). So an expert is known to the kernels by the address of its *own* first byte, and all experts of
a model share one layout even where they sit at different places of their slots.

Legend: H hidden, I expert intermediate size. gate_proj and up_proj are ``[I, H]``, down_proj ``[H, I]``.
"""

import ctypes
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from quant.errors import SchemeError
from quant.pack import Packed, dequantize
from quant.scheme import PACKED, Scheme

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_TENSORS = tuple((name, suffix) for name in _PROJECTIONS for suffix in ("weight_packed", "weight_scale"))
MAX_ALIGNMENT = 16  # bytes of the widest load


@dataclass(frozen=True)
class ExpertLayout:
    """The schemes of an expert and the byte ``offsets`` of its tensors from its address: packed words and scales of
    gate_proj, of up_proj, of down_proj.

    ``alignment`` divides the offset of packed words and must divide every address: 16 makes the widest loads
    possible. Offsets may be negative. Raises SchemeError for what the kernels do not read.
    """

    hidden: int
    inter: int
    gate_up: Scheme
    down: Scheme
    offsets: tuple[int, ...]
    alignment: int = MAX_ALIGNMENT

    def __post_init__(self) -> None:
        for scheme, features, name in ((self.gate_up, self.hidden, "gate_proj"), (self.down, self.inter, "down_proj")):
            if not scheme.is_packed:
                raise SchemeError(f"{name} is stored as {scheme}: the CUDA kernels read int2 to int8")
            if features < scheme.group_size or features % scheme.group_size:
                raise SchemeError(f"{name} has {features} input features: groups of {scheme} do not divide")
        packed = self.offsets[::2]
        if self.alignment not in (4, 8, 16) or any(offset % self.alignment for offset in packed):
            raise SchemeError(f"packed weights at offsets {packed}: expected multiples of {self.alignment}")

    @classmethod
    def from_offsets(
        cls,
        hidden: int,
        inter: int,
        schemes: Mapping[str, Scheme],
        offsets: Mapping[tuple[str, str], int],
        alignment: int = MAX_ALIGNMENT,
    ) -> Self:
        """The layout with ``schemes`` by projection and byte ``offsets`` by (projection, suffix).

        ``alignment`` is what the caller can promise of addresses; the offsets may lower it further.
        """
        if schemes["gate_proj"] != schemes["up_proj"]:
            raise SchemeError(
                f"gate_proj is {schemes['gate_proj']} and up_proj {schemes['up_proj']}: the CUDA kernels "
                "read both in one pass, in one scheme"
            )
        places = tuple(offsets[key] for key in _TENSORS)
        while alignment > 4 and any(place % alignment for place in places[::2]):
            alignment //= 2
        return cls(hidden, inter, schemes["gate_proj"], schemes["down_proj"], places, alignment)

    @classmethod
    def of_weights(cls, *tensors: Tensor) -> tuple[Self, int]:
        """(layout, address) of an expert whose six ``tensors``, in the order of ``offsets``, lie anywhere on one
        device: a shared expert, say."""
        gate_packed, gate_scale, up_packed, up_scale, down_packed, down_scale = tensors
        if any(not tensor.is_contiguous() for tensor in tensors):
            raise SchemeError("weights with gaps between rows: expected contiguous tensors")
        hidden, inter = down_packed.shape[0], gate_packed.shape[0]
        address = min(tensor.data_ptr() for tensor in tensors)
        schemes = {
            "gate_proj": _scheme(gate_packed, gate_scale, hidden),
            "up_proj": _scheme(up_packed, up_scale, hidden),
            "down_proj": _scheme(down_packed, down_scale, inter),
        }
        offsets = {key: tensor.data_ptr() - address for key, tensor in zip(_TENSORS, tensors, strict=True)}
        alignment = MAX_ALIGNMENT
        while alignment > 4 and address % alignment:
            alignment //= 2
        return cls.from_offsets(hidden, inter, schemes, offsets, alignment), address

    @property
    def gate_up_row(self) -> tuple[int, int]:
        """Packed words and scales of a row of gate_proj or up_proj."""
        return self.hidden * self.gate_up.bits // 32, self.hidden // self.gate_up.group_size

    @property
    def down_row(self) -> tuple[int, int]:
        """Packed words and scales of a row of down_proj."""
        return self.inter * self.down.bits // 32, self.inter // self.down.group_size

    @property
    def nbytes(self) -> int:
        """Bytes from the address to the end of the last tensor."""
        return max(offset + count for offset, count, *_ in self._extents())

    def dense(self, address: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """gate_proj, up_proj ``[I, H]`` and down_proj ``[H, I]``, dequantized from *host* memory at
        ``address``: the reference's way to read an expert."""
        found, extents = [], list(self._extents())
        for (at, count, rows, scheme), (scale_at, scale_count, *_) in zip(extents[::2], extents[1::2], strict=True):
            packed = _host_bytes(address + at, count).view(torch.int32).view(rows, -1)
            scale = _host_bytes(address + scale_at, scale_count).view(torch.bfloat16).view(rows, -1)
            found.append(dequantize(Packed(scheme, packed, scale), dtype))
        return found[0], found[1], found[2]

    def _extents(self) -> Iterator[tuple[int, int, int, Scheme]]:
        """(offset, bytes, rows, scheme) of each tensor."""
        for name, packed, scale in zip(_PROJECTIONS, self.offsets[::2], self.offsets[1::2], strict=True):
            rows, columns, scheme = self.inter, self.hidden, self.gate_up
            if name == "down_proj":
                rows, columns, scheme = self.hidden, self.inter, self.down
            yield packed, rows * columns * scheme.bits // 8, rows, scheme
            yield scale, rows * (columns // scheme.group_size) * 2, rows, scheme


def _scheme(packed: Tensor, scale: Tensor, in_features: int) -> Scheme:
    bits = packed.shape[1] * 32 // in_features
    if packed.dtype != torch.int32 or scale.dtype != torch.bfloat16 or bits not in PACKED:
        raise SchemeError(
            f"{packed.dtype} {tuple(packed.shape)} for {in_features} input features: expected int2 to int8 "
            "in int32 words with bf16 scales"
        )
    return Scheme(PACKED[bits], in_features // scale.shape[1])


def _host_bytes(address: int, count: int) -> Tensor:
    """``count`` bytes of host memory as a uint8 tensor that shares them; whoever owns them keeps them."""
    return torch.frombuffer((ctypes.c_uint8 * count).from_address(address), dtype=torch.uint8)
