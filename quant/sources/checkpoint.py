"""A checkpoint in somebody else's quantized form as if its weights were dense: the same names, f32 rows when read.

Whoever reads a source checkpoint, to round it, to judge it or to plan, sees tensors in floating point only: names and
shapes are those that the model's family gives its dense weights, and what they are made of is the form's business
(``quant.sources.weight``). Every stored tensor is part of a weight, known to be without meaning, or stays what it is
and is accounted for as in any other checkpoint.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from quant.checkpoint.checkpoint import Checkpoint
from quant.checkpoint.inventory import check_tensors
from quant.checkpoint.layout import ITEMSIZE
from quant.checkpoint.weight_files import TensorEntry
from quant.errors import CheckpointError
from quant.sources.weight import SourceWeight

# Of activations and of a quantized KV cache: no part of any weight.
_OF_ACTIVATIONS = re.compile(r"\.(input|output|activation|k|v|q|prob_output)_(global_)?(scale|zero_point)(_ub)?$")
_PARTS = re.compile(
    r"(\.weight_(scale|scale_inv|zero_point|g_idx|packed|shape|format)|\.weight\..+|_scale_inv|_blocks|_scales"
    r"|\.(qweight|qzeros|scales|g_idx|SCB))$"
)
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class SourceEntry(TensorEntry):
    """The dense tensor, f32, that ``weight`` stands for. It is nowhere as such: ``offset`` is of its first part."""

    weight: SourceWeight
    kept: str

    @property
    def kept_dtype(self) -> str:
        """See ``TensorEntry``."""
        return self.kept

    @property
    def file_nbytes(self) -> int:
        """See ``TensorEntry``."""
        return self.weight.stored_nbytes


class SourceCheckpoint(Checkpoint):
    """``raw`` with ``weights`` in place of the tensors that they are made of. Raises CheckpointError if a tensor has no
    place in the model, or is a part of a weight whose others are missing."""

    def __init__(self, raw: Checkpoint, weights: Iterable[SourceWeight]) -> None:
        self.raw = raw
        found = list(weights)
        used = {part.key for weight in found for part in weight.parts}
        kept = {key: entry for key, entry in raw.entries.items() if key not in used}
        self.unused = [key for key in kept if _OF_ACTIVATIONS.search(key)]
        for key in self.unused:
            del kept[key]
        dtype = _dtype(raw.config)
        entries: dict[str, TensorEntry] = kept
        for weight in found:
            if weight.key in entries:
                raise CheckpointError(f"{raw.path}: {weight.key} is there twice, dense and quantized")
            entries[weight.key] = _entry(weight, dtype)
        for key in kept:
            if _PARTS.search(key):
                raise CheckpointError(
                    f"{raw.path}: tensor {key} is a part of a quantized weight whose other parts are not there"
                )
        super().__init__(raw.path, without_quantization(raw.config), entries, raw.states)
        check_tensors(self)

    @cached_property
    def identity(self) -> str:
        """See ``CheckpointHeaders``."""
        return self.raw.identity

    @cached_property
    def files(self) -> list[Path]:
        """See ``CheckpointHeaders``."""
        return self.raw.files

    def read(self, key: str, start: int = 0, shape: tuple[int, ...] | None = None) -> Tensor:
        """See ``Checkpoint``: of a quantized weight whole rows can be read."""
        entry = self.entry(key)
        if not isinstance(entry, SourceEntry):
            return super().read(key, start, shape)
        wanted = entry.shape if shape is None else shape
        row = start // (entry.shape[-1] * ITEMSIZE[entry.dtype])
        return entry.weight.rows(row, row + math.prod(wanted[:-1])).view(wanted)

    def source_weight(self, module: str) -> SourceWeight | None:
        """The quantized weight of checkpoint module ``module``; None where it is dense, or part of a fused one."""
        entry = self.entries.get(self.alias(f"{module}.weight"))
        return entry.weight if isinstance(entry, SourceEntry) else None

    @property
    def forms(self) -> str:
        """What its weights are made of, in words, the commonest first."""
        counts = Counter(entry.weight.form for entry in self.entries.values() if isinstance(entry, SourceEntry))
        return "; ".join(f"{count:,} weights in {form}" for form, count in counts.most_common()) or "dense weights"


def _entry(weight: SourceWeight, kept: str) -> SourceEntry:
    first = weight.parts[0]
    nbytes = weight.weights * ITEMSIZE["F32"]
    return SourceEntry(weight.key, first.file, "F32", weight.shape, first.offset, nbytes, weight, weight.kept or kept)


def _dtype(config: dict[str, Any]) -> str:
    """The dtype that config.json says the model is in: what a weight is stored in that is kept dense."""
    for section in (config, config.get("text_config")):
        if isinstance(section, dict):
            for name in ("dtype", "torch_dtype"):
                if section.get(name) in _DTYPES:
                    return _DTYPES[section[name]]
    return "BF16"


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` as that of a model that is not quantized."""
    made = {key: value for key, value in config.items() if key != "quantization_config"}
    text = made.get("text_config")
    if isinstance(text, dict):
        made["text_config"] = {key: value for key, value in text.items() if key != "quantization_config"}
    return made
