"""Weights in fp8: one byte each (e4m3, no infinities), times a scale for the tensor, the row or a block.

Three definitions, which differ in the scale's name and place:

* compressed-tensors' ``float-quantized`` (Meta's Llama-4-Maverick-FP8): ``weight`` ``[N, K]`` and ``weight_scale``,
  ``[1]`` for the tensor, ``[N, 1]`` for rows, ``[N/BN, K/BK]`` for blocks (strategy and block size in the config);
* ``fbgemm_fp8`` (Meta's Llama-3.1-405B-FP8): ``weight_scale`` ``[N, 1]``;
* ``fp8`` (DeepSeek-V3, transformers' FineGrainedFP8): ``weight_scale_inv``, a scale for each block of
  ``weight_block_size``, the last of a row or column cut short; one for the tensor where the config says null.

Fused experts ``experts.gate_up_proj`` ``[E, N, K]`` have theirs in ``experts.gate_up_proj_scale`` or ``_scale_inv``
``[E, ...]``. W = code · scale. A scale of activations (``input_scale``) is not part of a weight.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.checkpoint.checkpoint import Checkpoint
from quant.checkpoint.weight_files import TensorEntry
from quant.errors import CheckpointError
from quant.kernels.quantize import widen_codes
from quant.sources.weight import SourceWeight, expect

_SCALE_DTYPES = ("BF16", "F16", "F32")
_SHARED = ("tensor", "channel", "block")
Block = tuple[int, int]


@dataclass(frozen=True)
class Float8Weight(SourceWeight):
    """An fp8 tensor, and one scale for each ``block`` of rows and columns of each matrix in it."""

    block: Block

    def rows(self, start: int, stop: int) -> Tensor:
        """See ``SourceWeight``."""
        weight, scale = self.parts
        (rows, columns), (height, width) = self.shape[-2:], self.block
        row = torch.arange(start, stop)
        grid = self.raw.read(scale.key).float().reshape(-1, -(-columns // width))
        factors = grid[row // rows * -(-rows // height) + row % rows // height]  # [R, columns / width]
        return widen_codes(self.stored_rows(weight, start, stop).view(torch.uint8), weight.dtype, factors, width)


def float8_weights(
    raw: Checkpoint, scales: Sequence[str], blocks: Sequence[Block] = (), shared: Collection[str] = _SHARED
) -> Iterator[Float8Weight]:
    """Every fp8 weight of ``raw``. ``scales`` are the endings that its scale may have after the module's name,
    ``blocks`` the block sizes and ``shared`` the parts of a weight with one scale (tensor, channel, block) that the
    config allows. Raises CheckpointError if there is no scale, or it does not fit.
    """
    for entry in raw.entries.values():
        if entry.dtype == "F8_E4M3":
            yield float8_weight(raw, entry, scales, blocks, shared)


def float8_weight(
    raw: Checkpoint,
    weight: TensorEntry,
    scales: Sequence[str],
    blocks: Sequence[Block],
    shared: Collection[str] = _SHARED,
) -> Float8Weight:
    """The weight that fp8 tensor ``weight`` makes with its scales."""
    owner = weight.key.removesuffix(".weight")
    names = [f"{owner}{'.weight' if owner != weight.key else ''}{ending}" for ending in scales]
    found = next((raw.entries[name] for name in names if name in raw.entries), None)
    if found is None:
        raise CheckpointError(f"{weight.file}: tensor {weight.key} has no scales: expected {names[0]} beside it")
    if len(weight.shape) not in (2, 3) or 0 in weight.shape:
        raise CheckpointError(f"{weight.file}: tensor {weight.key} has shape {list(weight.shape)}: expected a matrix")
    *experts, rows, columns = weight.shape
    sizes = list(blocks) if "block" in shared else []
    if "channel" in shared:  # a row's, or a column's where fused experts are transposed
        sizes = [(1, columns), *([(rows, 1)] if experts and not blocks else []), *sizes]
    if "tensor" in shared:
        sizes = [(rows, columns), *sizes]
    grids = {size: (-(-rows // size[0]), -(-columns // size[1])) for size in sizes}
    shapes = {(*experts, *grid): size for size, grid in reversed(grids.items())}
    if "tensor" in shared:
        shapes |= {(*experts,): (rows, columns)} | ({} if experts else {(1,): (rows, columns)})
    expect(found, _SCALE_DTYPES, *shapes)
    block = shapes[found.shape]
    return Float8Weight(raw, weight.key, weight.shape, _form(block, rows, columns), (weight, found), block)


def _form(block: Block, rows: int, columns: int) -> str:
    if block == (rows, columns):
        return "fp8, a scale per tensor"
    return "fp8, a scale per channel" if 1 in block else f"fp8, blocks of {block[0]}x{block[1]}"
