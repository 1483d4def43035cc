"""Foresight: which experts the coming layers will probably ask for.

The residual stream changes slowly from layer to layer, so a coming layer's router, applied to the hidden
state as it is now, mostly picks what it will pick when its turn comes. How far ahead that holds is measured
while it runs: every guess is compared with the choice that follows, and only distances that have been right
often enough are read for.

Legend: T tokens, H hidden, E experts, L MoE layers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_DEPTH = 4
_TRUST = (
    0.6  # read for a distance whose guesses have been right this often: below, the disk is better left idle
)
_MEMORY = 0.98  # what one guess leaves of the past


class Foresight:
    """Guesses for a stack of MoE layers. ``routers`` are ``[E, H]`` and ``norms`` ``[H]``, one per layer in
    order."""

    def __init__(
        self, layers: Sequence[int], routers: Sequence[Tensor], norms: Sequence[Tensor], top_k: int
    ) -> None:
        self.layers, self.top_k = list(layers), top_k
        self.experts = routers[0].shape[0]
        # A token's norm is one positive factor on all logits of a layer: it does not change which are
        # largest.
        weighted = [router.float() * norm.float() for router, norm in zip(routers, norms, strict=True)]
        self._routers = torch.cat(weighted)  # [L · E, H]
        self._index = {layer: index for index, layer in enumerate(self.layers)}
        self._guessed: dict[int, dict[int, frozenset[int]]] = {}  # layer → distance → experts
        self._right = [1.0] * (_DEPTH + 1)  # by distance; starts trusting

    @property
    def depth(self) -> int:
        """How many layers ahead guesses are good enough to read for."""
        depth = 0
        while depth < _DEPTH and self._right[depth + 1] >= _TRUST:
            depth += 1
        return depth

    def guess(self, layer: int, x: Tensor) -> list[tuple[int, int]]:
        """(layer, expert) that the layers after ``layer`` will probably want for x ``[T, H]``, nearest
        first."""
        here = self._index[layer]
        tokens = x.shape[0]
        reach = min(len(self.layers) - 1 - here, _DEPTH if tokens == 1 else 1)
        if reach <= 0:
            return []
        ahead = self._routers[(here + 1) * self.experts : (here + 1 + reach) * self.experts]
        logits = (x @ ahead.T).view(tokens, reach, self.experts)
        found: list[tuple[int, int]] = []
        for distance, top in enumerate(logits.topk(self.top_k, -1).indices.transpose(0, 1), 1):
            coming = self.layers[here + distance]
            experts, counts = top.flatten().unique(return_counts=True)
            ordered = experts[counts.argsort(descending=True, stable=True)].tolist()
            if tokens == 1:
                self._guessed.setdefault(coming, {})[distance] = frozenset(ordered)
            if distance <= self.depth or tokens > 1:
                found += [(coming, expert) for expert in ordered]
        return found

    def learn(self, layer: int, chosen: frozenset[int]) -> None:
        """Compare what was guessed for ``layer`` with what one token then chose."""
        for distance, experts in self._guessed.pop(layer, {}).items():
            right = len(experts & chosen) / max(len(experts), 1)
            self._right[distance] = _MEMORY * self._right[distance] + (1 - _MEMORY) * right
