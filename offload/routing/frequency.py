"""ExpertFrequency: how often each expert is asked for lately, and which swap is worth its copy. No tensors.

A request counts half as much after ``half_life`` tokens. Scores start from a routing profile where there is
one, scaled to what so many tokens would have built up, so that a run follows its text as fast with one as
without.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from offload.tiers import Key

HALF_LIFE = 64.0
MARGIN = 1.5
LIKELY = 0.9
Mask = npt.NDArray[np.bool_]
Ids = npt.NDArray[np.integer[Any]]


class ExpertFrequency:
    """Scores ``[rows, experts]`` of the experts of MoE layers ``layers``, in requests."""

    def __init__(
        self,
        layers: Sequence[int],
        experts: int,
        seed: Mapping[Key, float] | None = None,
        *,
        half_life: float = HALF_LIFE,
    ) -> None:
        self.layers = list(layers)
        self._row = {layer: row for row, layer in enumerate(layers)}
        self._decay = 2 ** (-1 / half_life)
        self._scores = np.zeros((len(self._row), experts))
        for (layer, expert), count in (seed or {}).items():
            self._scores[self._row[layer], expert] = count
        totals = self._scores.sum(1, keepdims=True)
        # What requests of one expert per token would add up to, once decay and requests balance.
        balanced = 1 / (1 - self._decay)
        self._scores *= np.divide(balanced, totals, out=np.zeros_like(totals), where=totals > 0)

    def count(self, layer: int, experts: Ids, tokens: int = 1) -> None:
        """``experts`` (with repeats; negative for none) were asked for by the ``tokens`` tokens of a step."""
        row = self._scores[self._row[layer]]
        row *= self._decay**tokens
        row += self._weight(tokens) * np.bincount(experts[experts >= 0], minlength=len(row))

    def count_step(self, chosen: Ids, tokens: int) -> None:
        """``chosen`` ``[rows, n]`` (negative for none) were asked for by the ``tokens`` tokens of a step."""
        self._scores *= self._decay**tokens
        rows, columns = np.nonzero(chosen >= 0)
        np.add.at(self._scores, (rows, chosen[rows, columns]), self._weight(tokens))

    def _weight(self, tokens: int) -> float:
        """What a request counts: tokens of one step are not told apart, so as much as they do on average."""
        return (1 - self._decay**tokens) / (1 - self._decay) / tokens

    def score(self, key: Key) -> float:
        """``key``'s requests lately."""
        return float(self._scores[self._row[key[0]], key[1]])

    def hottest(self, among: Mask) -> Key | None:
        """The hottest of ``among`` ``[rows, experts]``; of equals, the lower expert of the earlier layer."""
        return self._first(np.where(among, -self._scores, np.inf))

    def coldest(self, among: Mask) -> Key | None:
        """The coldest of ``among``; of equals, the higher expert of the later layer."""
        found = self._first(np.where(among, self._scores, np.inf)[::-1, ::-1])
        return None if found is None else self._mirrored(found)

    def ordered(self, keys: Iterable[Key]) -> list[Key]:
        """``keys``, hottest first; equals by expert and then layer, so that all layers get as many."""
        return sorted(keys, key=lambda key: (-self.score(key), key[1], key[0]))

    def worth_swapping(self, cold: Key, hot: Key) -> bool:
        """Whether ``hot`` is asked for so much more than ``cold`` that it is worth a copy: MARGIN times, and
        by more than one request."""
        low, high = self.score(cold), self.score(hot)
        return high > MARGIN * low and high - low > 1

    def likely(self, layer: int, tokens: int) -> list[int]:
        """The experts of ``layer`` that a step of ``tokens`` tokens asks for with a chance of LIKELY, one
        request per token supposed and every expert once more than it was seen."""
        row = self._scores[self._row[layer]] + 1
        used = 1 - (1 - row / row.sum()) ** tokens
        return [int(expert) for expert in np.argsort(-row, kind="stable") if used[expert] >= LIKELY]

    def _first(self, values: npt.NDArray[np.float64]) -> Key | None:
        # Column by column, so that equals are spread over the layers.
        flat = int(values.T.argmin())
        expert, row = divmod(flat, values.shape[0])
        return (self.layers[row], expert) if np.isfinite(values[row, expert]) else None

    def _mirrored(self, key: Key) -> Key:
        rows, experts = self._scores.shape
        return self.layers[rows - 1 - self._row[key[0]]], experts - 1 - key[1]
