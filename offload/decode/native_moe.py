"""NativeMoe: one MoE block as one native call, experts addressed where they lie.

The native block holds a table of addresses, one row per expert; the cache tells which rows are valid. A block
whose experts are all resident is routed and computed in a single call. Otherwise the call returns the choice
alone: the missing experts' reads begin, what is there is computed meanwhile, and each missing expert runs as
its bytes arrive.

This is how a prompt goes through; a decoded token's layers are one native call (``cpu.py``), which finds
experts in the same tables. While a prompt's layer runs, the next layer's experts are read ahead.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from offload.experts.cache.expert_cache import ExpertCache
from offload.experts.storage.store import ExpertWeights
from offload.model.moe import native_expert
from offload.routing.stats import RoutingStats
from offload.tiers import Key
from quant.kernels.lookahead import Lookahead
from quant.kernels.moe import FAILED, READY, GatedMlp, MoeBlock, MoeResult, mlp


class NativeMoe:
    """x + moe(norm(x)) of one of the MoE ``layers``, x f32 ``[T, H]`` on the CPU."""

    def __init__(
        self,
        layer: int,
        block: MoeBlock,
        cache: ExpertCache,
        routing: RoutingStats,
        exact: bool,
        layers: Sequence[int],
        lookahead: Lookahead | None = None,
    ) -> None:
        self.layer, self.block, self.cache, self.routing, self.exact = layer, block, cache, routing, exact
        self.layers, self.index, self.lookahead = layers, layers.index(layer), lookahead

    def run(self, x: Tensor) -> Tensor:
        """``[T, H]`` → ``[T, H]``. Raises CheckpointError if the disk fails."""
        self.cache.reap()
        result = self.block.run(x, exact=self.exact)
        if result.out is None:
            return self.finish(x, result)
        experts = self._record(result)
        self.cache.count_served([self.layer], [experts], [0])
        self._look_ahead(x, experts)
        return result.out

    def finish(self, x: Tensor, result: MoeResult) -> Tensor:
        """The block for ``x``, whose routing ``result`` found an expert missing: reads begin, and each
        expert is computed as its bytes arrive; where a token has several, in the order in which they are summed."""
        self.cache.reap()
        experts = self._record(result)
        keys = [(self.layer, expert) for expert in experts]
        self.cache.demand([key for key in keys if self.cache.tier_of(key) == "disk"])
        self._look_ahead(x, experts)
        out = x.clone()
        shared = self.block.shared_job(result)
        if shared:
            mlp(shared, result.normed, out, exact=self.exact)
        stream = self.cache.stream_in_order if self.block.top_k > 1 else self.cache.stream
        for expert, weights in stream(self.layer, experts):
            jobs = self.block.routed_jobs(result, {expert: native_expert(weights, self.block.join)})
            mlp(jobs, result.normed, out, exact=self.exact)
        return out

    def _record(self, result: MoeResult) -> list[int]:
        chosen = result.chosen.numpy().copy()
        self.routing.record(self.layer, chosen)
        return sorted(set(chosen.ravel().tolist()))

    def _look_ahead(self, x: Tensor, experts: Sequence[int]) -> None:
        if self.lookahead is not None and len(x) > 1:
            expected = self.lookahead.for_prompt(self.index, x)
            keys = [(self.layers[index], expert) for index, expert in expected]
            self.cache.prefetch(keys, {(self.layer, expert) for expert in experts})


class BlockTable:
    """Keeps the native blocks' tables of experts in step with the cache."""

    def __init__(self, blocks: Mapping[int, NativeMoe]) -> None:
        self.blocks = blocks
        self._gated: dict[int, tuple[ExpertWeights, GatedMlp]] = {}

    def coming(self, key: Key, weights: ExpertWeights) -> None:
        """Enter where an expert will be."""
        if id(weights) not in self._gated:  # kept with the weights: an id is theirs only while they live
            self._gated[id(weights)] = weights, native_expert(weights, self.blocks[key[0]].block.join)
        _, expert = self._gated[id(weights)]
        self.blocks[key[0]].block.set_expert(key[1], expert, ready=False)

    def arrived(self, key: Key, whole: bool) -> None:
        """An expert's bytes are there, or will never be: whoever waits for them goes on."""
        self.blocks[key[0]].block.publish(key[1], READY if whole else FAILED)

    def evicted(self, key: Key) -> None:
        """Take an expert out before its slot is overwritten."""
        self.blocks[key[0]].block.clear_expert(key[1])
