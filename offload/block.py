"""NativeMoe: one MoE block as one native call, experts addressed where they lie.

The native block holds a table of addresses, one row per expert; the cache tells which rows are valid. A block
whose experts are all resident is routed and computed in a single call. Otherwise the call returns the choice
alone: the missing experts' reads begin, what is there is computed meanwhile, and each missing expert runs as
its bytes arrive.

While a layer waits, the next layer's experts are guessed: its router applied to the hidden state as it is
now. The residual stream changes slowly from layer to layer, so the guess is usually right; a wrong one reads
at low priority.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from offload.foresight import Foresight
from offload.residency import ExpertCache, Key
from offload.routing import RoutingStats
from offload.store import ExpertWeights
from quant.kernels.moe import GatedMlp, MoeBlock, MoeResult, mlp


class NativeMoe:
    """x + moe(norm(x)) of one layer, x f32 ``[T, H]`` on the CPU."""

    def __init__(
        self, layer: int, block: MoeBlock, cache: ExpertCache, routing: RoutingStats, exact: bool,
        foresight: Foresight | None = None,
    ) -> None:  # fmt: skip
        self.layer, self.block, self.cache, self.routing, self.exact = layer, block, cache, routing, exact
        self.foresight = foresight

    def run(self, x: Tensor) -> Tensor:
        """``[T, H]`` → ``[T, H]``. Raises CheckpointError if the disk fails."""
        self.cache.reap()
        result = self.block.run(x, exact=self.exact)
        if result.out is None:
            return self.finish(x, result)
        experts = self._record(result)
        self.cache.serve([(self.layer, expert) for expert in experts])
        self._look_ahead(x, experts)
        return result.out

    def finish(self, x: Tensor, result: MoeResult) -> Tensor:
        """The block for ``x``, whose routing ``result`` found an expert missing: reads begin, what is
        resident is computed meanwhile, and each missing expert as its bytes arrive."""
        self.cache.reap()
        experts = self._record(result)
        keys = [(self.layer, expert) for expert in experts]
        missing = [key for key in keys if self.cache.tier_of(key) == "disk"]
        if not missing and self.block.holds(experts):  # they have landed since the call began
            self.cache.serve(keys)
            self._look_ahead(x, experts)
            done = self.block.run(x, exact=self.exact).out
            assert done is not None
            return done
        self.cache.demand(missing)
        self._look_ahead(x, experts)
        out = x.clone()
        shared = self.block.shared_job(result)
        if shared:
            mlp(shared, result.normed, out, exact=self.exact)
        for expert, weights in self.cache.stream(self.layer, experts):
            mlp(
                self.block.routed_jobs(result, {expert: gated(weights)}), result.normed, out, exact=self.exact
            )
        return out

    def _record(self, result: MoeResult) -> list[int]:
        chosen = result.chosen.numpy().copy()
        self.routing.record(self.layer, chosen)
        experts: list[int] = sorted(set(chosen.ravel().tolist()))
        if self.foresight is not None and len(chosen) == 1:
            self.foresight.learn(self.layer, frozenset(experts))
        return experts

    def _look_ahead(self, x: Tensor, experts: Sequence[int]) -> None:
        if self.foresight is not None:
            self.cache.prefetch(
                self.foresight.guess(self.layer, x), {(self.layer, expert) for expert in experts}
            )


def gated(weights: ExpertWeights) -> GatedMlp:
    """The native descriptors of a resident expert."""
    parts = [w.descriptor() for w in (weights.gate_proj, weights.up_proj, weights.down_proj)]
    assert all(part is not None for part in parts)
    return GatedMlp(*parts)  # type: ignore[arg-type]


class BlockTable:
    """Keeps the native blocks' address tables in step with the cache."""

    def __init__(self, blocks: Mapping[int, NativeMoe]) -> None:
        self.blocks = blocks
        self._layouts: dict[int, Any] = {}
        self._gated: dict[int, GatedMlp] = {}

    def landed(self, key: Key, weights: ExpertWeights) -> None:
        """Enter a resident expert; one stored unlike its layer's others stays out and runs as a job of its
        own."""
        expert = self._gated.setdefault(id(weights), gated(weights))
        if expert.layout == self._layouts.setdefault(key[0], expert.layout):
            self.blocks[key[0]].block.set_expert(key[1], expert)

    def evicted(self, key: Key) -> None:
        """Take an expert out before its slot is overwritten."""
        self.blocks[key[0]].block.clear_expert(key[1])


def is_native(weights: ExpertWeights) -> bool:
    """Whether the native block can run experts stored like these."""
    return all(w.descriptor() is not None for w in (weights.gate_proj, weights.up_proj, weights.down_proj))
