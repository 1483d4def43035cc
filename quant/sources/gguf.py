"""Weights in GGUF's types, as llama.cpp's quantizers write them: Q8_0, Q4_K, IQ4_XS and the rest.

Each row is a whole number of blocks. What a block stands for is defined by ggml and written down in Python by the
``gguf`` package, whose ``dequantize`` is what computes it here, but for the commonest types, which native code does.
llama.cpp stores the rows of q_proj and k_proj of the ``llama`` architecture in another order than transformers, for its
rotary embedding; ``heads`` puts them back.

Legend: E experts, N out features, K in features, D rows of one head.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from quant.kernels.quantize import knows_codes, widen_codes
from quant.sources.weight import SourceWeight

_Q = GGMLQuantizationType
PLAIN = {_Q.F32: "F32", _Q.F16: "F16", _Q.BF16: "BF16"}
QUANTIZED = (
    *(_Q.Q8_0, _Q.Q4_0, _Q.Q4_1, _Q.Q5_0, _Q.Q5_1, _Q.Q2_K, _Q.Q3_K, _Q.Q4_K, _Q.Q5_K, _Q.Q6_K),
    *(_Q.IQ4_NL, _Q.IQ4_XS, _Q.IQ3_S, _Q.IQ3_XXS, _Q.IQ2_S, _Q.IQ2_XS, _Q.IQ2_XXS, _Q.IQ1_S, _Q.IQ1_M, _Q.MXFP4),
)


@dataclass(frozen=True)
class GgufWeight(SourceWeight):
    """Rows from ``first`` on of the stored tensor, which is bytes ``[rows, row_bytes]``, of type ``kind``.

    ``heads`` is 0, or the number of heads whose rows are stored in llama.cpp's order.
    """

    kind: GGMLQuantizationType
    first: int = 0
    heads: int = 0

    def rows(self, start: int, stop: int) -> Tensor:
        """See ``SourceWeight``."""
        if len(self.shape) == 1:
            return self._stored(0, 1)
        if not self.heads:
            return self._stored(start, stop)
        size = self.shape[0] // self.heads
        low, high = start // size * size, -(-stop // size) * size
        row = torch.arange(start, stop)
        place, half = row % size, size // 2
        stored = row - place + place % half * 2 + place // half - low
        return self._stored(low, high)[stored]

    def _stored(self, start: int, stop: int) -> Tensor:
        data = self.stored_rows(self.parts[0], self.first + start, self.first + stop)
        return dequantized(data, self.kind)

    @property
    def kept(self) -> str:
        """See ``SourceWeight``: what is in floating point stays as it is."""
        return PLAIN.get(self.kind, "")

    @property
    def stored_nbytes(self) -> int:
        """See ``SourceWeight``: of an expert, its part of the tensor of all."""
        part = self.parts[0]
        rows = self.weights // self.shape[-1]
        return rows * part.shape[-1]


def dequantized(data: Tensor, kind: GGMLQuantizationType) -> Tensor:
    """Rows of bytes ``[R, row_bytes]`` of type ``kind`` as f32 ``[R, K]``."""
    if knows_codes(kind.name):
        return widen_codes(data, kind.name)
    octets: Any = data.numpy()
    with np.errstate(all="ignore"):  # what is no number is found when it is rounded
        found = dequantize(octets, kind)
    return torch.from_numpy(np.ascontiguousarray(found, dtype=np.float32))
