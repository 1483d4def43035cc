"""Foresight: which experts the coming layers will probably ask for.

The residual stream changes slowly from layer to layer, so a coming layer's router, applied to the hidden
state as it is now, mostly picks what it will pick when its turn comes. A guess is worth a read if it is right
often enough; how far the best logits stand out says how likely that is, and what margin is needed at which
distance is learned while the model runs: every guess is compared with the choice that follows.

Legend: T tokens, H hidden, E experts, L MoE layers, k experts per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quant.kernels import native

Logits = npt.NDArray[np.float32]

DEPTH = 6
# Read for guesses that have been right this often: a wrong one costs the disk as much as a right one.
_TRUST = 0.75
_MEMORY = 0.98  # what one guess leaves of the past
_MARGINS = (0.05, 0.15, 0.3, 0.6)  # in standard deviations of a layer's logits: the bins that are learned


@dataclass
class _Record:
    """How often guesses of one distance were right, by bins of margin."""

    right: list[float] = field(default_factory=lambda: [_TRUST] * (len(_MARGINS) + 1))

    def learn(self, margin_bin: int, share: float) -> None:
        self.right[margin_bin] = _MEMORY * self.right[margin_bin] + (1 - _MEMORY) * share

    def trusts(self, margin_bin: int) -> bool:
        return self.right[margin_bin] >= _TRUST


class Foresight:
    """Guesses for the MoE layers ``layers``; ``routers`` ``[E, H]`` and ``norms`` ``[H]``, one of each per
    layer."""

    def __init__(
        self, layers: Sequence[int], routers: Sequence[Tensor], norms: Sequence[Tensor], top_k: int
    ) -> None:
        self.layers, self.top_k, self.experts = list(layers), top_k, routers[0].shape[0]
        # A token's norm is one positive factor on all logits of a layer: it does not change which are
        # largest.
        weighted = [router.float() * norm.float() for router, norm in zip(routers, norms, strict=True)]
        self._routers = torch.cat(weighted)  # [L · E, H]
        self._windows: dict[tuple[int, int], native.Weight] = {}
        self._index = {layer: index for index, layer in enumerate(self.layers)}
        self._records = [_Record() for _ in range(DEPTH)]
        self._first_records = [_Record() for _ in range(DEPTH)]  # from a token's embedding alone
        self._guessed: dict[int, list[tuple[_Record, int, list[int]]]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the routers' copy."""
        return self._routers.nbytes

    def guess(self, layer: int, x: Tensor) -> list[tuple[int, int]]:
        """(layer, expert) that the MoE layers after ``layer`` (-1: from the first on) will probably want for
        x ``[T, H]``, nearest first."""
        here, tokens = self._index[layer] if layer >= 0 else -1, x.shape[0]
        reach = min(len(self.layers) - 1 - here, DEPTH if tokens == 1 else 1)
        if reach <= 0:
            return []
        logits = native.linear(x, self._ahead(here + 1, reach)).numpy()
        if tokens > 1:
            return self._for_prompt(self.layers[here + 1], logits)
        # numpy: of a dozen small steps, a third of torch's price
        logits = logits.reshape(reach, self.experts)
        order = np.argsort(-logits, -1, kind="stable")[:, : self.top_k + 1]
        top = np.take_along_axis(logits, order, -1)
        margins = ((top[:, self.top_k - 1] - top[:, -1]) / logits.std(-1)).tolist()
        records = self._records if layer >= 0 else self._first_records
        found: list[tuple[int, int]] = []
        for distance, (margin, experts) in enumerate(zip(margins, order.tolist(), strict=True)):
            coming, margin_bin = self.layers[here + 1 + distance], sum(margin > edge for edge in _MARGINS)
            chosen = experts[: self.top_k]
            self._guessed.setdefault(coming, []).append((records[distance], margin_bin, chosen))
            if records[distance].trusts(margin_bin):
                found += [(coming, expert) for expert in chosen]
        return found

    def _ahead(self, index: int, count: int) -> native.Weight:
        """The routers of ``count`` layers from the one at ``index`` on, as one matrix."""
        if (index, count) not in self._windows:
            rows = self._routers[index * self.experts : (index + count) * self.experts]
            self._windows[index, count] = native.Weight.from_tensors("f32", rows)
        return self._windows[index, count]

    def _for_prompt(self, coming: int, logits: Logits) -> list[tuple[int, int]]:
        """Of a prompt's many tokens the next layer wants nearly all experts: the most wanted first."""
        chosen = np.argpartition(-logits, self.top_k - 1, -1)[:, : self.top_k]
        wanted = np.bincount(chosen.ravel(), minlength=self.experts)
        order = np.argsort(-wanted, kind="stable").tolist()
        return [(coming, expert) for expert in order if wanted[expert]]

    def learn(self, layer: int, chosen: frozenset[int]) -> None:
        """Compare what was guessed for ``layer`` with what one token then chose."""
        for record, margin_bin, experts in self._guessed.pop(layer, ()):
            record.learn(margin_bin, sum(expert in chosen for expert in experts) / len(experts))
