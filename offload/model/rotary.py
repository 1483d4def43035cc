"""RotaryAngles: the cosines and sines of rotary position embeddings, from the model's own module, on the CPU.

Legend: T tokens, r rotated channels of a head.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_POSITIONS = 64  # computed at a time
_KEPT = 32  # spans of so many: sequences in one step are at places of their own


class RotaryAngles:
    """The angles of transformers' module ``rotary``, of which a copy is kept."""

    def __init__(self, rotary: Any) -> None:
        self._rotary = copy.deepcopy(rotary).to("cpu")
        kind = str(getattr(rotary, "rope_type", "dynamic"))
        # Some kinds depend on how long the text is by now: then each position is computed alone.
        self._step = 1 if "dynamic" in kind or kind == "longrope" else _POSITIONS
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}  # by first position, the latest used last

    def at(self, position: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines f32 ``[r/2]`` at ``position``; neighbours are kept for the next calls."""
        cosine, sine = self.of([position])
        return cosine[0], sine[0]

    def of(self, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Cosines and sines f32 ``[T, r/2]`` at ``positions``."""
        found = [self._row(position) for position in positions]
        if len(found) == 1:
            return found[0]
        return torch.cat([cosine for cosine, _ in found]), torch.cat([sine for _, sine in found])

    def _row(self, position: int) -> tuple[Tensor, Tensor]:
        within = position % self._step
        start = position - within
        kept = self._kept.pop(start, None) or self.span(start, self._step)
        self._kept[start] = kept
        if len(self._kept) > _KEPT:
            del self._kept[next(iter(self._kept))]
        return kept[0][within : within + 1], kept[1][within : within + 1]

    def span(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines f32 ``[T, r/2]`` of ``count`` tokens from position ``first`` on."""
        found = self._rotary(torch.zeros(1, 1, 1), torch.arange(first, first + count)[None])
        if isinstance(found, tuple):  # in most families repeated for the two halves of a head
            half = self._rotary.inv_freq.numel()
            return found[0][0, :, :half].contiguous(), found[1][0, :, :half].contiguous()
        return found[0].real.contiguous(), found[0].imag.contiguous()  # Llama 4
