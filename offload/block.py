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

import torch
from torch import Tensor, nn

from offload.residency import ExpertCache, Key
from offload.routing import RoutingStats
from offload.store import ExpertWeights
from quant.kernels.moe import GatedMlp, Job, MoeBlock, MoeResult, RouterKind, mlp
from quant.kernels.weight import Weight
from quant.linear import QuantLinear


class NativeMoe:
    """x + moe(norm(x)) of one layer, x f32 ``[T, H]`` on the CPU. ``following`` is the next layer's, for
    guessing."""

    def __init__(
        self, layer: int, block: MoeBlock, cache: ExpertCache, routing: RoutingStats, exact: bool
    ) -> None:
        self.layer, self.block, self.cache, self.routing, self.exact = layer, block, cache, routing, exact
        self.following: NativeMoe | None = None

    def run(self, x: Tensor) -> Tensor:
        """``[T, H]`` → ``[T, H]``. Raises CheckpointError if the disk fails."""
        self.cache.reap()
        result = self.block.run(x, exact=self.exact)
        chosen = result.chosen.numpy()
        self.routing.record(self.layer, chosen)
        experts: list[int] = sorted(set(chosen.ravel().tolist()))
        keys = [(self.layer, expert) for expert in experts]
        if result.out is not None:
            self.cache.count(self.layer, experts)
            self.cache.use(keys)
            self._guess(x, keys)
            return result.out
        missing = [key for key in keys if self.cache.tier_of(key) == "disk"]
        self.cache.demand(missing)
        self._guess(x, keys)
        out = x.clone()
        shared = self.block.shared_job(result)
        if shared:
            mlp(shared, result.normed, out, exact=self.exact)
        for expert, weights in self.cache.stream(self.layer, experts):
            mlp(self._jobs(result, expert, weights), result.normed, out, exact=self.exact)
        return out

    def _jobs(self, result: MoeResult, expert: int, weights: ExpertWeights) -> list[Job]:
        return self.block.routed_jobs(result, {expert: gated(weights)})

    def _guess(self, x: Tensor, protected: Sequence[Key]) -> None:
        following = self.following
        if following is None or self.cache.holds_all:
            return
        guess = following.block.run(x, exact=False, route_only=True).chosen
        experts, counts = torch.unique(guess, return_counts=True)
        ordered = experts[counts.argsort(descending=True, stable=True)].tolist()
        self.cache.prefetch([(following.layer, expert) for expert in ordered], set(protected))


def gated(weights: ExpertWeights) -> GatedMlp:
    """The native descriptors of a resident expert."""
    parts = [w.descriptor() for w in (weights.gate_proj, weights.up_proj, weights.down_proj)]
    assert all(part is not None for part in parts)
    return GatedMlp(*parts)  # type: ignore[arg-type]


class BlockTable:
    """Keeps the native blocks' address tables in step with the cache."""

    def __init__(self, blocks: Mapping[int, NativeMoe]) -> None:
        self.blocks = blocks
        self._layout: Any = None
        self._gated: dict[int, GatedMlp] = {}

    def landed(self, key: Key, weights: ExpertWeights) -> None:
        """Enter a resident expert; one stored unlike the others stays out and runs as a job of its own."""
        expert = self._gated.setdefault(id(weights), gated(weights))
        self._layout = self._layout or expert.layout
        if expert.layout == self._layout:
            self.blocks[key[0]].block.set_expert(key[1], expert)

    def evicted(self, key: Key) -> None:
        """Take an expert out before its slot is overwritten."""
        self.blocks[key[0]].block.clear_expert(key[1])


class NativeLayer(nn.Module):
    """A decoder layer whose MoE block is native and whose attention is the stock module's."""

    def __init__(self, stock: nn.Module, moe: NativeMoe) -> None:
        super().__init__()
        self.input_layernorm, self.self_attn = stock.input_layernorm, stock.self_attn
        self.moe = moe

    def forward(self, hidden_states: Tensor, **context: Any) -> Tensor:
        """``[1, T, H]`` → ``[1, T, H]``; ``context`` is what the stock layer passes to attention."""
        attention, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **context)  # type: ignore[operator]
        hidden_states = hidden_states + attention
        return self.moe.run(hidden_states.view(-1, hidden_states.shape[-1])).view_as(hidden_states)


def install(model: Any, cache: ExpertCache, routing: RoutingStats, exact: bool) -> None:
    """Replace the MoE layers of a loaded model by native ones and let the cache feed them."""
    layers = model.model.layers
    blocks: dict[int, NativeMoe] = {}
    for layer in routing.moe_layers:
        stock = layers[layer]
        blocks[layer] = NativeMoe(layer, _moe_block(stock, model.config), cache, routing, exact)
        layers[layer] = NativeLayer(stock, blocks[layer])
    for before, after in zip(routing.moe_layers, routing.moe_layers[1:], strict=False):
        blocks[before].following = blocks[after]
    cache.listener = BlockTable(blocks)


def _moe_block(stock: Any, config: Any) -> MoeBlock:
    norm = stock.post_attention_layernorm
    eps = float(norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)
    shared, kind = None, "softmax_normalized"
    if hasattr(stock, "feed_forward"):
        block, kind = stock.feed_forward, "sigmoid_input"
        router = block.router.weight
        shared = GatedMlp(
            *(_weight(getattr(block.shared_expert, name)) for name in ("gate_proj", "up_proj", "down_proj"))
        )
        top_k = block.top_k
    else:
        router, top_k = stock.mlp.gate.weight, stock.mlp.gate.top_k
        kind = "softmax_normalized" if getattr(stock.mlp.gate, "norm_topk_prob", True) else "softmax"
    router_kind: RouterKind = kind  # type: ignore[assignment]
    return MoeBlock(
        Weight.from_tensors("f32", router.data.float()),
        top_k,
        router_kind,
        shared,
        None,
        norm.weight.data,
        eps,
    )


def _weight(linear: QuantLinear) -> Weight:
    descriptor = linear.stored.descriptor()
    assert descriptor is not None
    return descriptor


def is_native(weights: ExpertWeights) -> bool:
    """Whether the native block can run experts stored like these."""
    return all(w.descriptor() is not None for w in (weights.gate_proj, weights.up_proj, weights.down_proj))
