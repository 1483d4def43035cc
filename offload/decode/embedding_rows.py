"""EmbeddingRows: a few rows of a bf16 embedding as f32, without torch.

A decode step reads so much that the processor's caches hold nothing of what the step before left there: each torch
operation then costs about 50 µs of fetching its own code, and a lookup is four of them.

Legend: T tokens, V vocabulary, H hidden.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quant.kernels.stack import MAX_ROWS


class EmbeddingRows:
    """Rows of an embedding bf16 ``[V, H]`` on the CPU. ``count`` is V."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight  # kept alive: the table is a view of it
        self._table: NDArray[np.int16] = weight.view(torch.int16).numpy()
        self.count = len(weight)
        self._rows = torch.empty(MAX_ROWS, weight.shape[1])
        self._halves = self._rows.view(torch.int16).numpy().reshape(MAX_ROWS, weight.shape[1], 2)

    @classmethod
    def of(cls, weight: Tensor) -> "EmbeddingRows | None":
        """Those of ``weight``; None if it is not stored so."""
        return cls(weight) if weight.dtype == torch.bfloat16 and weight.device.type == "cpu" else None

    def rows(self, ids: Sequence[int]) -> Tensor:
        """f32 ``[T, H]`` of at most MAX_ROWS ``ids``, each below ``count``; overwritten by the next call."""
        halves = self._halves[: len(ids)]
        halves[..., 0] = 0
        halves[..., 1] = self._table[ids]  # bf16 is the upper half of f32; the machine is little endian
        return self._rows[: len(ids)]
