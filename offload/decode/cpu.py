"""NativeDecoder: the language model on the CPU, one native call per decode step and two per layer for a
prompt.

It takes its weights and its rotary embedding from the loaded transformers model and gives the same logits;
what it leaves out is the Python between them, about a millisecond per layer and token. The stock model stays
the oracle.

Legend: T tokens, H hidden.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offload.decode.native_moe import BlockTable, NativeMoe
from offload.experts.cache.host_cache import ExpertCache
from offload.experts.storage.reader import Priority
from offload.experts.storage.store import ExpertStore, find_weight
from offload.hardware.probe import Machine
from offload.model.kv_cache import KVCache
from offload.model.layer_parts import attention_shape, norm_eps, router_kind, router_weight
from offload.routing.stats import RoutingStats
from quant.kernels.attention import Attention
from quant.kernels.lookahead import Lookahead
from quant.kernels.moe import GatedMlp, Job, MoeBlock, mlp
from quant.kernels.stack import DenseBlock, Head, Stack, Stop
from quant.kernels.weight import Weight
from quant.linear import QuantLinear
from quant.model.shape import ModelShape

Mlp = Callable[[Tensor], Tensor]
_LAST = 4  # the last quarter of the layers guesses the next token while it waits
_ANGLES = 64  # positions whose RoPE angles are computed at a time


class NativeDecoder:
    """A decoder-only MoE model, f32 activations. ``exact`` keeps them so in the products, too."""

    def __init__(
        self,
        model: Any,
        shape: ModelShape,
        experts: ExpertCache,
        routing: RoutingStats,
        exact: bool,
        *,
        guess_tokens: bool = True,
    ) -> None:
        self.shape, self.experts, self.routing, self.exact = shape, experts, routing, exact
        layers = model.model.layers
        self.embedding, self.norm, self.lm_head = model.model.embed_tokens, model.model.norm, model.lm_head
        self.rotary = model.model.rotary_emb
        self.attentions = [_attention(layer, model.config) for layer in layers]
        self.lookahead: Lookahead | None = None
        if not experts.holds_all:
            routers = [router_weight(layers[index]).data for index in shape.moe_layers]
            norms = [layers[index].post_attention_layernorm.weight.data for index in shape.moe_layers]
            self.lookahead = Lookahead(routers, norms, shape.top_k)
        self.moes: dict[int, NativeMoe] = {}
        self.mlps: list[Mlp] = []
        blocks: list[MoeBlock | DenseBlock] = []
        for index, layer in enumerate(layers):
            if index in shape.moe_layers:
                block = _moe_block(layer)
                self.moes[index] = NativeMoe(index, block, experts, routing, exact, shape.moe_layers, self.lookahead)
                self.mlps.append(self.moes[index].run)
                blocks.append(block)
            else:
                self.mlps.append(_dense_mlp(layer, exact))
                blocks.append(_dense_block(layer))
        rotary = self._computed_angles(torch.zeros(1, shape.hidden_size), 0)[0].shape[1] * 2
        self.stack = Stack(self.attentions, blocks, rotary, self._head())
        self._moe_layers = list(self.moes)
        self._table: tuple[int, Tensor, Tensor] | None = None
        self._attached: KVCache | None = None
        experts.watch(BlockTable(self.moes))
        rows = self.embedding.weight.data
        readable = rows.dtype in (torch.bfloat16, torch.float32) and self.stack.token_logits is not None
        if self.lookahead is not None and readable and guess_tokens:
            self.stack.guess_tokens(rows, -(-len(layers) // _LAST))

    @staticmethod
    def knows(config: Any) -> bool:
        """Whether the native attention computes what this config asks for."""
        return getattr(config, "clip_qkv", None) is None

    def forward(self, ids: Sequence[int], cache: KVCache, *, keep: int = 1) -> Tensor:
        """Append ``ids`` to ``cache`` and return the logits ``[keep, vocab]`` of the last ``keep`` tokens.

        Raises BudgetError if the cache is full and CheckpointError if an expert cannot be read.
        """
        position = cache.get_seq_length()
        x: Tensor = self.embedding(torch.tensor(ids))
        cosine, sine = self._angles(x, position)
        if len(ids) == 1:
            x = self._step(x, position, cache, cosine[0], sine[0])
            if self.stack.token_logits is not None:
                return self.stack.token_logits.clone()[None]
        else:
            x = self._prefill(x, position, cache, cosine, sine)
        logits: Tensor = self.lm_head(self.norm(x[-keep:]))
        return logits

    def _prefill(self, x: Tensor, position: int, cache: KVCache, cosine: Tensor, sine: Tensor) -> Tensor:
        """x ``[T, H]`` through all layers, two calls each."""
        for attention, run_mlp, layer in zip(self.attentions, self.mlps, cache.kept, strict=True):
            parts = []
            for first, count, buffers in layer.spans(x.shape[0], self.shape.num_kv_heads, self.shape.head_dim):
                span = slice(first, first + count)
                parts.append(
                    attention.run(x[span], position + first, buffers, cosine[span], sine[span], exact=self.exact)
                )
            x = run_mlp(parts[0] if len(parts) == 1 else torch.cat(parts))
        return x

    def _step(self, x: Tensor, position: int, cache: KVCache, cosine: Tensor, sine: Tensor) -> Tensor:
        """x ``[1, H]`` through all layers, in one call if every expert is resident."""
        cache.kept[0].check(1)
        if self._attached is not cache:
            buffers = [layer.buffers(self.shape.num_kv_heads, self.shape.head_dim) for layer in cache.kept]
            self.stack.attach(buffers, position)
            self._attached = cache
        for index in self.shape.chunked_layers:
            self.stack.move(index, cache.kept[index].start)
        self.experts.reap()
        cosine, sine, attended = cosine.contiguous(), sine.contiguous(), 0
        self.stack.begin(x, position, cosine, sine, self.exact, self.lookahead)
        while (stop := self.stack.go()) is not None:
            for layer in cache.kept[attended : stop.attended]:
                layer.advance(1)
            attended = stop.attended
            self._supply(stop)
        for layer in cache.kept[attended:]:
            layer.advance(1)
        self._note()
        return x

    def _supply(self, stop: Stop) -> None:
        """Begin the reads that a step waits for, and those that its coming layers will."""
        self.experts.reap()
        waiting = [(stop.finished, expert) for expert in stop.waiting]
        locked = self.experts.demand(waiting) if waiting else set()
        if stop.wanted:
            self.experts.prefetch(stop.wanted, locked)
        if stop.wanted_next or not stop.attended:  # at a token's start: what the last one guessed is over
            self.experts.prefetch(stop.wanted_next, locked | set(stop.wanted), Priority.NEXT)

    def _note(self) -> None:
        """Count what a token chose, and what it had to wait for."""
        chosen = self.stack.chosen.numpy()[self._moe_layers, : self.shape.top_k].astype(np.int64)
        self.routing.record_step(chosen[None])
        waited = self.stack.late.tolist()
        late = [waited[layer].bit_count() for layer in self._moe_layers]
        self.experts.serve(self._moe_layers, chosen.tolist(), late)

    def _head(self) -> Head | None:
        if not isinstance(self.lm_head, QuantLinear) or self.lm_head.bias is not None:
            return None
        weight = self.lm_head.stored.descriptor()  # None for f16, which torch multiplies
        return None if weight is None else Head(self.norm.weight.data, norm_eps(self.norm), weight)

    def _angles(self, x: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """RoPE's cosines and sines ``[T, d/2]`` for the tokens from ``position`` on."""
        kind = str(getattr(self.rotary, "rope_type", "dynamic"))
        if x.shape[0] > 1 or "dynamic" in kind or kind == "longrope":  # depend on how long the text is by now
            return self._computed_angles(x, position)
        start = position // _ANGLES * _ANGLES
        if self._table is None or self._table[0] != start:
            self._table = (start, *self._computed_angles(x.expand(_ANGLES, -1), start))
        _, cosine, sine = self._table
        row = slice(position - start, position - start + 1)
        return cosine[row], sine[row]

    def _computed_angles(self, x: Tensor, position: int) -> tuple[Tensor, Tensor]:
        found = self.rotary(x[None], torch.arange(position, position + x.shape[0])[None])
        if isinstance(found, tuple):  # cosines and sines, repeated for the two halves of a head
            half = found[0].shape[-1] // 2
            return found[0][0, :, :half], found[1][0, :, :half]
        return found[0].real, found[0].imag


def _attention(layer: Any, config: Any) -> Attention:
    stock, norm = layer.self_attn, layer.input_layernorm
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    q_norm, k_norm = getattr(stock, "q_norm", None), getattr(stock, "k_norm", None)
    q, k, v, o = (_weight(getattr(stock, name)) for name in names)
    biases = tuple(getattr(stock, name).bias for name in names)
    return Attention(
        attention_shape(layer, config),
        q,
        k,
        v,
        o,
        norm.weight.data,
        None if q_norm is None else q_norm.weight.data,
        None if k_norm is None else k_norm.weight.data,
        biases,
    )


def _moe_block(layer: Any) -> MoeBlock:
    norm, shared = layer.post_attention_layernorm, None
    if hasattr(layer, "feed_forward"):  # Llama 4
        shared = _gated(layer.feed_forward.shared_expert)
    kind, top_k = router_kind(layer)
    weight = Weight.from_tensors("f32", router_weight(layer).data.float().contiguous())
    return MoeBlock(weight, top_k, kind, shared, None, norm.weight.data, norm_eps(norm))


def head_fits_a_wait(store: ExpertStore, machine: Machine) -> bool:
    """Whether the logits can be computed while one expert is read from the disk of ``machine``."""
    head = next((spec for spec in store.shape.dense_linears() if spec.role == "lm_head"), None)
    if head is None:  # it is the embedding
        return False
    nbytes = find_weight(store.checkpoint, head)[0].nbytes(head.out_features, head.in_features)
    return nbytes / machine.ram_gb_s < store.slot_bytes / machine.disk_gb_s


def _dense_mlp(layer: Any, exact: bool) -> Mlp:
    job, norm = Job(_dense_gated(layer)), layer.post_attention_layernorm
    return lambda x: mlp([job], norm(x), x.clone(), exact=exact)


def _dense_block(layer: Any) -> DenseBlock:
    norm = layer.post_attention_layernorm
    return DenseBlock(_dense_gated(layer), norm.weight.data, norm_eps(norm))


def _dense_gated(layer: Any) -> GatedMlp:
    return _gated(layer.feed_forward if hasattr(layer, "feed_forward") else layer.mlp)


def _gated(module: Any) -> GatedMlp:
    return GatedMlp(_weight(module.gate_proj), _weight(module.up_proj), _weight(module.down_proj))


def _weight(linear: QuantLinear) -> Weight:
    descriptor = linear.stored.descriptor()
    assert descriptor is not None, "every Linear that is loaded is in a form that the native kernels read"
    return descriptor
