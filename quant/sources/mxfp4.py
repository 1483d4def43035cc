"""Experts in MXFP4, as gpt-oss is published: 4-bit floating point codes, 32 of which share a power of two.

Definition: the OCP Microscaling format, laid out as transformers' ``mxfp4`` integration reads it. ``..._blocks`` uint8
``[E, N, K/32, 16]``, two codes (e2m1) to a byte, the first in the low nibble; ``..._scales`` uint8 ``[E, N, K/32]``,
the exponent plus 127. W = code · 2^(scale - 127). The weight that it stands for is the transposed one, ``[E, K, N]``,
as the family's fused experts are stored: ``experts.gate_up_proj`` and ``experts.down_proj``.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.checkpoint.checkpoint import Checkpoint
from quant.errors import CheckpointError
from quant.sources.weight import SourceWeight, expect, look_up

_SHARED, _BYTES = 32, 16
_BLOCKS, _SCALES = "_blocks", "_scales"
_LEVELS = torch.tensor((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))
_E2M1 = torch.cat((_LEVELS, -_LEVELS))
_PAIRS = torch.stack((_E2M1.repeat(16), _E2M1.repeat_interleave(16)), 1)  # low nibble first
# The format has no number for 255.
_POWERS = torch.cat((torch.ldexp(torch.ones(255), torch.arange(-127, 128)), torch.tensor([float("nan")])))


@dataclass(frozen=True)
class Mxfp4Weight(SourceWeight):
    """The experts of one projection."""

    def rows(self, start: int, stop: int) -> Tensor:
        """See ``SourceWeight``. Decodes every expert that has some of the rows as a whole."""
        columns = self.shape[1]
        experts = range(start // columns, -(-stop // columns))
        taken = [self._expert(expert)[max(0, start - expert * columns) : stop - expert * columns] for expert in experts]
        return taken[0].contiguous() if len(taken) == 1 else torch.cat(taken)

    def _expert(self, expert: int) -> Tensor:
        """One expert's weight ``[K, N]``."""
        blocks, scales = self.parts
        _, columns, rows = self.shape
        groups = columns // _SHARED
        codes = self.raw.read(blocks.key, expert * rows * groups * _BYTES, (rows, groups * _BYTES))
        powers = _POWERS[self.raw.read(scales.key, expert * rows * groups, (rows, groups)).int()]
        return look_up(codes, _PAIRS).view(rows, groups, _SHARED).mul_(powers[..., None]).view(rows, columns).t()


def mxfp4_weights(raw: Checkpoint) -> Iterator[Mxfp4Weight]:
    """Every MXFP4 weight of ``raw``. Raises CheckpointError, naming it, for a tensor that is missing or unfit."""
    for key, blocks in raw.entries.items():
        if not key.endswith(_BLOCKS):
            continue
        if blocks.dtype != "U8" or len(blocks.shape) != 4 or blocks.shape[3] != _BYTES or 0 in blocks.shape:
            raise CheckpointError(
                f"{blocks.file}: tensor {key} is {blocks.dtype} {list(blocks.shape)}: expected U8 [E, N, K/32, 16]"
            )
        name = key.removesuffix(_BLOCKS)
        scales = raw.entries.get(name + _SCALES)
        if scales is None:
            raise CheckpointError(f"{blocks.file}: tensor {key} has no scales: expected {name}{_SCALES} beside it")
        expect(scales, ("U8",), blocks.shape[:3])
        count, rows, groups, _ = blocks.shape
        yield Mxfp4Weight(raw, name, (count, groups * _SHARED, rows), "MXFP4", (blocks, scales))
