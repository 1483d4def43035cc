"""Integers that a source already has, taken over as they are: nothing is rounded but scales to bf16.

Symmetric int4 and int8 by another quantizer are the same numbers in another layout. A scale for a whole row or tensor
is written once for each group. Where the source's scales are f16 or f32 they lose bits that bf16 has not, 0.2 % of a
weight at the most, which the report counts as error; bf16 scales lose nothing.

Legend: N out features, K in features, G groups along K.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from quant.checkpoint.checkpoint import Checkpoint
from quant.errors import UsageError
from quant.model.families import Role
from quant.model.mixed_precision import joined
from quant.pack import Packed, dequantize
from quant.rounding.encode import Encoded, check_finite, packed_words
from quant.rounding.rounding import Rounder
from quant.scheme import BF16, GROUP_SIZES, Scheme
from quant.sources.checkpoint import SourceCheckpoint
from quant.sources.weight import SourceWeight

_FOR_ROWS = (128, 256, 64, 32)  # groups in which one scale of many columns is written, the commonest first


class Repacked:
    """Keeps the integers of ``checkpoint`` wherever they are asked for in their own scheme; ``other`` does the rest."""

    name = "repack"

    def __init__(self, checkpoint: Checkpoint, other: Rounder) -> None:
        self._checkpoint, self._other = checkpoint, other

    def encode(self, weight: Tensor, scheme: Scheme, label: str, transposed: bool, module: str, row: int) -> Encoded:
        """See ``Rounder``."""
        found = _weight(self._checkpoint, module)
        if found is None or transposed or scheme != own_scheme(found):
            return self._other.encode(weight, scheme, label, transposed, module, row)
        check_finite(weight, label)
        kept = found.integers(row, row + len(weight))
        groups = weight.shape[1] // scheme.group_size
        scale = kept.scale.bfloat16().repeat_interleave(groups // kept.scale.shape[1], 1).contiguous()
        packed = Packed(scheme, packed_words(kept.values.contiguous(), scheme.bits), scale)
        error = dequantize(packed).sub_(weight)
        return Encoded(
            {"weight_packed": packed.packed, "weight_scale": scale},
            float(weight.square().sum(dtype=torch.float64)),
            float(error.square_().sum(dtype=torch.float64)),
        )


def own_scheme(weight: SourceWeight) -> Scheme | None:
    """The scheme that has the integers of ``weight`` as they are; None where none has."""
    if weight.bits not in (4, 8) or len(weight.shape) != 2:
        return None
    columns = weight.shape[1]
    size = columns // weight.integers(0, 1).scale.shape[1]
    if size not in GROUP_SIZES:
        size = next((group for group in _FOR_ROWS if size % group == 0), 0)
    return Scheme("int4" if weight.bits == 4 else "int8", size) if size else None


def own_schemes(checkpoint: Checkpoint) -> Mapping[Role, Scheme]:
    """The scheme of each role by the integers that it has; bf16 for weights that have none. Raises UsageError if no
    weight has any."""
    known = ((linear, _weight(checkpoint, linear.module)) for linear in checkpoint.shape.linears())
    found = joined((linear, (own_scheme(weight) if weight else None) or BF16) for linear, weight in known)
    if not any(scheme.is_packed for scheme in found.values()):
        raise UsageError(
            f"--repack keeps symmetric int4 and int8 as they are, and {checkpoint.path} has none; "
            "say what its weights are rounded to"
        )
    return found


def _weight(checkpoint: Checkpoint, module: str) -> SourceWeight | None:
    return checkpoint.source_weight(module) if isinstance(checkpoint, SourceCheckpoint) else None
