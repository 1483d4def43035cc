"""RoutingStats: which experts a model chose, layer by layer, and in what order.

Counts seed the placement of experts; reuse distances say how often a cache of a given size would hit. The
statistics are saved as versioned JSON, a *routing profile*, and travel with the model.

Legend: L MoE layers, E experts, T tokens, k experts per token.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from offload.routing.frequency import Ids
from offload.routing.trace import PROFILE_MARK, PROFILE_VERSION, checked_steps, read_profile
from quant.errors import ProfileError
from quant.input_file import validated
from quant.model.shape import ModelShape
from quant.output_file import save_output

_BATCH = 256
_MOST_TOKENS = 2**40  # sums of counts stay whole numbers of 64 bits
_REUSE_BINS = 17  # distances of 1, 2, 3-4, 5-8 … 2^15 tokens and more


_Count = Annotated[int, Field(ge=0, lt=_MOST_TOKENS)]


class _Counted(BaseModel):
    """What a routing profile counts."""

    model_config = ConfigDict(strict=True, extra="ignore")
    model_id: str
    top_k: int
    tokens: _Count
    counts: list[list[_Count]]
    reuse: list[list[_Count]]
    image_tokens: _Count = 0
    image_counts: list[list[_Count]] | None = None


@dataclass(frozen=True)
class LayerSkew:
    """How unevenly one layer uses its experts: the share of requests that goes to the most used 10, 25 and 50
    % of experts, and the entropy of use in bits (log2 E if uniform)."""

    layer: int
    top10: float
    top25: float
    top50: float
    entropy: float


class RoutingStats:
    """Live counts; ``record`` is called once per layer and step, in layer order."""

    def __init__(self, model_id: str, shape: ModelShape, *, keep_trace: bool = False) -> None:
        self.model_id = model_id
        self.moe_layers, self.num_experts, self.top_k = shape.moe_layers, shape.num_experts, shape.top_k
        layers, experts = len(self.moe_layers), self.num_experts
        self._tokens = 0
        self._counts: Ids = np.zeros((layers, experts), np.int64)
        self._reuse: Ids = np.zeros((layers, _REUSE_BINS), np.int64)
        self.image_tokens = 0  # of all tokens, those known to be rows of images; and what they asked for, [L, E]
        self.image_counts: Ids = np.zeros((layers, experts), np.int64)
        self.trace: list[Ids] | None = [] if keep_trace else None  # per step [T, L, k]
        self._last_used: Ids = np.full((layers, experts), -1, np.int64)
        self._step: list[Ids] = []
        self._waiting: list[Ids] = []  # per step [T, L, k], not yet counted

    @property
    def tokens(self) -> int:
        """Tokens seen."""
        return self._flushed()._tokens

    @property
    def counts(self) -> Ids:
        """Uses of each expert, ``[L, E]``."""
        return self._flushed()._counts

    @property
    def reuse(self) -> Ids:
        """Distances in tokens between uses of the same expert, counted by powers of two, ``[L, bins]``."""
        return self._flushed()._reuse

    def record(self, layer: int, chosen: Ids) -> None:
        """``chosen`` int64 ``[T, k]``: the experts of each token in ``layer``. Folded in at the last
        layer."""
        if layer == self.moe_layers[0]:
            self._step = []
        self._step.append(chosen)
        if layer == self.moe_layers[-1] and len(self._step) == len(self.moe_layers):
            self.record_step(np.stack(self._step, 1))
            self._step = []

    def record_step(self, chosen: Ids) -> None:
        """``chosen`` int64 ``[T, L, k]``: the experts of each token in every MoE layer. The array is kept."""
        self._waiting.append(chosen)
        if len(self._waiting) >= _BATCH:
            self._flushed()

    def count_images(self, chosen: Ids) -> None:
        """Of the tokens that were recorded, ``chosen`` int64 ``[T, L, k]`` were rows of images."""
        for index in range(chosen.shape[1]):
            self.image_counts[index] += np.bincount(chosen[:, index].ravel(), minlength=self.num_experts)
        self.image_tokens += len(chosen)

    def _flushed(self) -> "RoutingStats":
        """Count what waits: many steps at once, because numpy's price is per call."""
        if self._waiting:
            seen = np.concatenate(self._waiting)  # [T, L, k]
            self._waiting = []
            for index in range(seen.shape[1]):
                self._counts[index] += np.bincount(seen[:, index].ravel(), minlength=self.num_experts)
                self._count_reuse(index, seen[:, index])
            self._tokens += len(seen)
            if self.trace is not None:
                self.trace.append(seen)
        return self

    def _count_reuse(self, layer: int, chosen: Ids) -> None:
        """``chosen`` ``[T, k]`` of the ``layer``-th MoE layer: uses by expert and, of each, by token, beside the use
        before."""
        experts, tokens = chosen.ravel(), np.repeat(np.arange(len(chosen)) + self._tokens, chosen.shape[1])
        order = np.argsort(experts, kind="stable")
        experts, tokens = experts[order], tokens[order]
        first = np.append(True, experts[1:] != experts[:-1])[: len(experts)]
        before = np.where(first, self._last_used[layer, experts], np.roll(tokens, 1))
        distances = np.maximum(tokens - before, 1)[before >= 0]
        bins = np.ceil(np.log2(distances)).astype(np.int64).clip(max=_REUSE_BINS - 1)
        self._reuse[layer] += np.bincount(bins, minlength=_REUSE_BINS)
        self._last_used[layer, experts] = tokens  # the last of equal places stays

    def skew(self) -> list[LayerSkew]:
        """How uneven each layer's use is."""
        return [self._skew(layer, self.counts[i]) for i, layer in enumerate(self.moe_layers)]

    def image_overlap(self) -> list[float]:
        """How alike images and text use each layer's experts: Σ min(p, q) over experts of their shares of requests, 1
        where both ask for the same, 0 where nothing is asked for by both. Empty unless both were seen."""
        text = self.counts - self.image_counts
        if not text.any() or not self.image_counts.any():
            return []
        shares = (use / np.maximum(use.sum(1, keepdims=True), 1) for use in (text, self.image_counts))
        return [float(least) for least in np.minimum(*shares).sum(1)]

    def _skew(self, layer: int, counts: Ids) -> LayerSkew:
        total = max(int(counts.sum()), 1)
        shares = np.sort(counts)[::-1] / total
        top = [float(shares[: max(1, math.ceil(self.num_experts * part))].sum()) for part in (0.1, 0.25, 0.5)]
        used = shares[shares > 0]
        return LayerSkew(layer, top[0], top[1], top[2], float(-(used * np.log2(used)).sum()))

    def merge(self, other: "RoutingStats") -> None:
        """Add ``other``'s counts. Raises ProfileError if they are of another model."""
        other.check(self.model_id)
        self._flushed()
        self._tokens += other.tokens
        self._counts += other.counts
        self._reuse += other.reuse
        self.image_tokens += other.image_tokens
        self.image_counts += other.image_counts

    def check(self, model_id: str) -> None:
        """Raise ProfileError unless these are statistics of the model ``model_id``."""
        if self.model_id != model_id:
            raise ProfileError(
                f"the routing statistics are of model {self.model_id}, this model is {model_id}: run "
                "`coldstream profile` on this model"
            )

    def to_json(self) -> dict[str, Any]:
        """What ``save`` writes."""
        return {
            "version": PROFILE_VERSION,
            "model_id": self.model_id,
            "moe_layers": list(self.moe_layers),
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "tokens": self.tokens,
            "counts": self.counts.tolist(),
            "reuse": self.reuse.tolist(),
            "image_tokens": self.image_tokens,
            "image_counts": self.image_counts.tolist() if self.image_tokens else None,
            "trace": None if not self.trace else np.concatenate(self.trace).tolist(),
        }

    def save(self, path: Path) -> None:
        """Write JSON to ``path``, whole or not at all; an earlier profile there is replaced, nothing else. Raises
        OutputError."""
        save_output(path, json.dumps(self.to_json()).encode(), PROFILE_MARK)

    @classmethod
    def load(cls, path: Path, shape: ModelShape) -> "RoutingStats":
        """Read what ``save`` wrote, now or when profiles also had transition counts. Raises ProfileError if
        the file is unreadable or of a model of another shape."""
        data = read_profile(path)
        layers, experts = tuple(data["moe_layers"]), data["num_experts"]
        if (layers, experts) != (shape.moe_layers, shape.num_experts):
            raise ProfileError(
                f"{path} is of a model with {len(layers)} MoE layers of {experts} experts: expected "
                f"{len(shape.moe_layers)} of {shape.num_experts}"
            )
        found: _Counted = validated(_Counted, data, f"{path} is a damaged routing profile", ProfileError)
        stats = cls(found.model_id, shape)
        if found.top_k != shape.top_k:
            raise ProfileError(
                f"{path} is of a model that takes {found.top_k} experts per token, this one {shape.top_k}"
            )
        stats._tokens = found.tokens
        stats.image_tokens = found.image_tokens
        for name, counts in (("counts", stats._counts), ("reuse", stats._reuse), ("image_counts", stats.image_counts)):
            rows, columns = counts.shape
            given: list[list[int]] | None = getattr(found, name)
            if given is None and not found.image_tokens:
                continue
            if given is None or len(given) != rows or any(len(row) != columns for row in given):
                raise ProfileError(f"{path} is a damaged routing profile: {name} is not {rows} rows of {columns}")
            counts[:] = given
        if (stats.image_counts > stats._counts).any() or stats.image_tokens > stats._tokens:
            raise ProfileError(f"{path} is a damaged routing profile: images have more than all tokens")
        if data.get("trace"):
            stats.trace = [np.array(checked_steps(data, path), np.int64)]
        return stats
