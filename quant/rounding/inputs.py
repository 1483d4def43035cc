"""The mean input of a model's Linears, estimated from its weights alone.

What a layer norm puts out has a mean per channel that is far from zero, and rounding errors that do not
cancel against it shift every token alike. Without any text, the mean is taken over the vocabulary: of the
embeddings, normalized as the norm would, times the norm's weight. The deeper the layer the rougher that is.

Legend: V vocabulary, H hidden size, K in features.
"""

import re
from functools import cached_property

import torch
from torch import Tensor

from quant.checkpoint.checkpoint import Checkpoint
from quant.rounding.search import MAX_MEAN

_ROWS = 4096  # of the embedding, evenly spread over the vocabulary
_BLOCKS = 256
_LAYER = re.compile(r"layers\.(\d+)\.")
_ATTENTION = ("q_proj", "k_proj", "v_proj")


class InputMeans:
    """Estimates for one source checkpoint; reads some rows of the embedding and the norms' weights."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._mlp = {*checkpoint.shape.family.projections[:2], "gate_proj", "up_proj"}
        self._known: dict[str, Tensor | None] = {}

    def of(self, module: str) -> Tensor | None:
        """The mean input of checkpoint module ``module`` as int32 ``[K]``, the largest 127; None where
        nothing is known of it: what follows no norm."""
        last, layer = module.rpartition(".")[2], _LAYER.search(module)
        if layer is None or (last not in _ATTENTION and last not in self._mlp):
            return None
        norm = "input_layernorm" if last in _ATTENTION else "post_attention_layernorm"
        key = f"{self._checkpoint.shape.layer_prefix(int(layer[1]))}{norm}.weight"
        if key not in self._known:
            self._known[key] = self._after(key)
        return self._known[key]

    def _after(self, key: str) -> Tensor | None:
        if key not in self._checkpoint.entries:
            return None
        mean = self._embedded * self._checkpoint.read(key).float()
        largest = float(mean.abs().max())
        if not 0 < largest < float("inf"):  # NaN fails too
            return None
        return (mean * (MAX_MEAN / largest)).round().to(torch.int32)

    @cached_property
    def _embedded(self) -> Tensor:
        """The mean of the normalized embeddings, f32 ``[H]``."""
        shape = self._checkpoint.shape
        entry = self._checkpoint.find(f"{shape.embedding_module}.weight")
        rows, width = entry.shape
        row_bytes, run = entry.nbytes // rows, max(1, min(rows, _ROWS) // min(rows, _BLOCKS))
        total, count = torch.zeros(width), 0
        for start in range(0, rows - run + 1, max(run, rows // _BLOCKS)):
            block = self._checkpoint.read(entry.key, start * row_bytes, (run, width)).float()
            total += (block * torch.rsqrt(block.square().mean(1, keepdim=True) + 1e-5)).sum(0)
            count += run
        return total / count
