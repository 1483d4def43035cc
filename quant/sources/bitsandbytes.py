"""Weights as bitsandbytes serializes them: 4 bits by a table of levels, or 8 bits by rows.

* 4 bits (nf4, fp4): ``weight`` uint8 ``[N·K/2, 1]``, two codes to a byte, the first in the *high* nibble; a level for
  each code in ``weight.quant_map`` f32 ``[16]``; ``weight.absmax``, one for each block of the flattened weight; and
  ``weight.quant_state.bitsandbytes__nf4`` (or ``fp4``), a JSON text that has the block's size and the shape. With
  double quantization ``absmax`` is uint8, by the 256 levels of ``weight.nested_quant_map``, blocks of which share
  ``weight.nested_absmax``, plus an offset in the JSON. W = level · absmax.
* 8 bits (LLM.int8()): ``weight`` int8 ``[N, K]``, ``SCB`` f32 ``[N]``, the largest magnitude of each row.
  W = code · SCB / 127; ``weight_format`` 0 says that it is stored by rows.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from quant.checkpoint.checkpoint import Checkpoint
from quant.checkpoint.weight_files import TensorEntry
from quant.errors import CheckpointError
from quant.input_file import parse_json, validated
from quant.sources.weight import Integers, SourceWeight, beside, expect, look_up

_STATE = ".quant_state.bitsandbytes__"
_STATE_BYTES = 4096
_BY_127 = 7.874015718698502e-3  # 1/127 as bitsandbytes writes it
# What its kernels compute with, whatever levels are stored.
_LEVELS = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": tuple(sign * level / 12 for sign in (1, -1) for level in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
}
_Size = Annotated[int, Field(ge=1, le=2**40)]
_Block = Literal[32, 64, 128, 256, 512, 1024, 2048, 4096]


class _State(BaseModel):
    """The JSON text beside a weight in 4 bits."""

    model_config = ConfigDict(strict=True, extra="ignore")
    quant_type: Literal["nf4", "fp4"]
    blocksize: _Block
    dtype: Literal["bfloat16", "float16", "float32"]
    shape: Annotated[list[_Size], Field(min_length=2, max_length=2)]
    nested_blocksize: _Block | None = None
    nested_offset: float = 0.0


@dataclass(frozen=True)
class FourBitWeight(SourceWeight):
    """A weight by a table of 16 levels; ``parts`` are the codes, the levels and the scales."""

    block: int
    nested: tuple[int, float] | None

    def rows(self, start: int, stop: int) -> Tensor:
        """See ``SourceWeight``."""
        columns = self.shape[1]
        first, last = start * columns, stop * columns
        edge = first // 2
        codes = self.raw.read(self.parts[0].key, edge, (-(-last // 2) - edge, 1))
        flat = look_up(codes, self._pairs()).view(-1)[first - edge * 2 :][: last - first]
        block = first // self.block
        scales = self._absmax(block, -(-last // self.block))
        if first % self.block or last % self.block:
            scales = scales.repeat_interleave(self.block)[first - block * self.block :][: last - first]
            return flat.mul(scales).view(-1, columns)
        return flat.view(-1, self.block).mul_(scales[:, None]).view(-1, columns)

    def _pairs(self) -> Tensor:
        levels = self.raw.read(self.parts[1].key)
        return torch.stack((levels.repeat_interleave(16), levels.repeat(16)), 1)  # high nibble first

    def _absmax(self, first: int, last: int) -> Tensor:
        """Scales of blocks ``[first, last)``."""
        entry = self.parts[2]
        stored = self.raw.read(entry.key, first * entry.nbytes // entry.shape[0], (last - first,))
        if self.nested is None:
            return stored
        size, offset = self.nested
        table, shared = (self.raw.read(part.key) for part in self.parts[3:5])
        return table[stored.int()] * shared[torch.arange(first, last) // size] + offset


@dataclass(frozen=True)
class RowInt8Weight(SourceWeight):
    """A weight in int8 by rows; ``parts`` are the codes and the largest magnitudes."""

    def rows(self, start: int, stop: int) -> Tensor:
        """See ``SourceWeight``."""
        codes, largest = self.parts[:2]
        return self.stored_rows(codes, start, stop).float().mul_(self._largest(largest, start, stop)).mul_(_BY_127)

    @property
    def bits(self) -> int:
        """See ``SourceWeight``."""
        return 8

    def integers(self, start: int, stop: int) -> Integers:
        """See ``SourceWeight``."""
        codes, largest = self.parts[:2]
        return Integers(self.stored_rows(codes, start, stop), self._largest(largest, start, stop) * _BY_127)

    def _largest(self, entry: TensorEntry, start: int, stop: int) -> Tensor:
        return self.raw.read(entry.key, start * 4, (stop - start, 1))


def bitsandbytes_weights(raw: Checkpoint) -> Iterator[SourceWeight]:
    """Every weight of ``raw`` that bitsandbytes wrote. Raises CheckpointError, naming it, for a tensor that is missing
    or unfit."""
    for key, entry in raw.entries.items():
        if key.endswith(".weight") and entry.dtype == "U8":
            yield _four_bits(raw, entry)
        elif key.endswith(".weight") and entry.dtype == "I8":
            yield _eight_bits(raw, entry)


def _four_bits(raw: Checkpoint, weight: TensorEntry) -> FourBitWeight:
    key = weight.key
    state = next(
        (raw.entries[name] for kind in ("nf4", "fp4") if (name := f"{key}{_STATE}{kind}") in raw.entries), None
    )
    if state is None:
        raise CheckpointError(f"{weight.file}: tensor {key} has no description: expected {key}{_STATE}nf4 beside it")
    if state.dtype != "U8" or state.nbytes > _STATE_BYTES:
        raise CheckpointError(f"{state.file}: tensor {state.key} is {state.dtype}: expected U8, a short JSON text")
    name = f"{state.file}: tensor {state.key}"
    said: _State = validated(_State, parse_json(raw.read(state.key).numpy().tobytes(), name), name)
    count = math.prod(said.shape)
    blocks = -(-count // said.blocksize)
    levels = beside(raw, weight, f"{key}.quant_map", "levels")
    absmax = beside(raw, weight, f"{key}.absmax", "scales")
    half = -(-count // 2)
    expect(weight, ("U8",), (half, 1), (1, half), (half,))
    expect(levels, ("F32",), (16,))
    if not torch.allclose(raw.read(levels.key), torch.tensor(_LEVELS[said.quant_type]), 0, 1e-6):
        raise CheckpointError(f"{levels.file}: tensor {levels.key} has other levels than those of {said.quant_type}")
    nested: tuple[TensorEntry, ...] = ()
    if said.nested_blocksize is not None:
        table = beside(raw, absmax, f"{key}.nested_quant_map", "levels")
        shared = beside(raw, absmax, f"{key}.nested_absmax", "scales")
        expect(absmax, ("U8",), (blocks,))
        expect(table, ("F32",), (256,))
        expect(shared, ("F32",), (-(-blocks // said.nested_blocksize),))
        nested = (table, shared)
    else:
        expect(absmax, ("F32",), (blocks,))
    form = f"bitsandbytes {said.quant_type}" + (", scales quantized as well" if nested else "")
    doubled = None if said.nested_blocksize is None else (said.nested_blocksize, said.nested_offset)
    parts = (weight, levels, absmax, *nested, state)
    return FourBitWeight(raw, key, tuple(said.shape), form, parts, said.blocksize, doubled)


def _eight_bits(raw: Checkpoint, weight: TensorEntry) -> RowInt8Weight:
    module = weight.key.removesuffix(".weight")
    largest = beside(raw, weight, f"{module}.SCB", "scales")
    if len(weight.shape) != 2 or 0 in weight.shape:
        raise CheckpointError(f"{weight.file}: tensor {weight.key} has shape {list(weight.shape)}: expected a matrix")
    expect(largest, ("F32",), (weight.shape[0],))
    layout = raw.entries.get(f"{module}.weight_format")
    if layout is not None:
        expect(layout, ("U8",), (), (1,))
        if int(raw.read(layout.key)) != 0:
            raise CheckpointError(f"{layout.file}: tensor {layout.key} is not 0: expected weights stored by rows")
    parts = (weight, largest, *((layout,) if layout is not None else ()))
    return RowInt8Weight(raw, weight.key, weight.shape, "bitsandbytes int8", parts)
