"""NativeDecoder: the language model on the CPU, one native call per decode step, whosever rows are in it, and two per
layer for a prompt.

It takes its weights and its rotary embedding from the loaded transformers model and gives the same logits;
what it leaves out is the Python between them, about a millisecond per layer and token. The stock model stays
the oracle.

Legend: T tokens, H hidden.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from offload.decode.decoder import Decoder, Row
from offload.decode.embedding_rows import EmbeddingRows
from offload.decode.native_moe import BlockTable, NativeMoe
from offload.experts.cache.expert_cache import ExpertCache
from offload.experts.storage.reader import Priority
from offload.experts.storage.store import ExpertStore
from offload.model.gate import Gate
from offload.model.kv_cache import SequenceCache
from offload.model.layer_parts import LayerParts, all_layer_parts, norm_eps
from offload.model.paged_cache import PagedCache
from offload.model.rotary import RotaryAngles
from offload.model.router import Router
from offload.routing.stats import RoutingStats
from quant.kernels.attention import Attention
from quant.kernels.lookahead import Lookahead
from quant.kernels.moe import GatedMlp, Job, MoeBlock, mlp
from quant.kernels.stack import MAX_ROWS, DenseBlock, Head, Segment, Stack, Stop
from quant.kernels.swiglu import SILU, SwiGlu
from quant.kernels.weight import Weight
from quant.linear import Compute, QuantLinear
from quant.model.shape import ModelShape

_Mlp = Callable[[Tensor], Tensor]
_LAST = 4  # the last quarter of the layers guesses the next token while it waits


class NativeDecoder(Decoder):
    """A decoder-only MoE model, f32 activations; with ``compute.exact`` they stay so in the products, too.

    ``guess_tokens``: while the last layers wait for the disk, guess the next token and read for it.
    """

    reads_disk_pages = True

    def __init__(
        self,
        model: Any,
        shape: ModelShape,
        experts: ExpertCache,
        routing: RoutingStats,
        compute: Compute,
        *,
        guess_tokens: bool = True,
        join: SwiGlu = SILU,
    ) -> None:
        super().__init__()
        self.join = join
        self.model, self.shape, self.experts, self.routing = model, shape, experts, routing
        self.name, self.exact, self._guess_tokens = compute.name, compute.exact, guess_tokens
        self.norm, self.lm_head = model.model.norm, model.lm_head
        self.angles = RotaryAngles(model.model.rotary_emb)
        self.weights_moved()

    @staticmethod
    def reads(config: Any, store: ExpertStore, join: Gate = SILU) -> bool:
        """Whether the native kernels compute what ``config`` asks for, on experts stored like those of ``store`` whose
        gate and up are joined by ``join``."""
        if not store.shape.layers_on_cpu or getattr(config, "clip_qkv", None) is not None:
            return False
        biased = getattr(config, "mlp_bias", False) or getattr(config, "use_bias", False)
        if getattr(config, "hidden_act", "silu") != "silu" or biased:
            return False
        return isinstance(join, SwiGlu) and store.reads_native and store.reads_biases

    def weights_moved(self) -> None:
        """See Decoder. The native blocks hold addresses, so all of them are made anew."""
        shape, experts = self.shape, self.experts
        parts = all_layer_parts(self.model, shape)
        routed = [part for part in parts if part.router is not None]
        self.lookahead: Lookahead | None = None
        if routed and not experts.holds_all:
            routers = [part.router for part in routed if part.router is not None]
            self.lookahead = Lookahead(
                [router.weight for router in routers],
                [part.mlp_norm for part in routed],
                shape.top_k,
                MAX_ROWS,
                [router.bias for router in routers if router.bias is not None],
                [router.correction for router in routers if router.correction is not None],
                routers[0].selection,
            )
        self._rows: list[int] = []  # whose step was the last
        self.attentions = [_attention(part) for part in parts]
        self.moes: dict[int, NativeMoe] = {}
        self.mlps: list[_Mlp] = []
        blocks: list[MoeBlock | DenseBlock] = []
        for index, part in enumerate(parts):
            if part.router is not None:
                block = _moe_block(part, part.router, join=self.join)
                self.moes[index] = NativeMoe(
                    index, block, experts, self.routing, self.exact, shape.moe_layers, self.lookahead
                )
                self.mlps.append(self.moes[index].run)
                blocks.append(block)
            else:
                gated = _gated(part.mlp)
                self.mlps.append(_dense_mlp(part, gated, self.exact))
                blocks.append(DenseBlock(gated, part.mlp_norm, part.eps))
        self.stack = Stack(self.attentions, blocks, 2 * self.angles.at(0)[0].numel(), self._head())
        self._moe_layers = list(self.moes)
        experts.watch(BlockTable(self.moes))
        rows = self.model.get_input_embeddings().weight.data
        readable = rows.dtype in (torch.bfloat16, torch.float32) and self.stack.token_logits is not None
        self._table = EmbeddingRows.of(rows)
        if self.lookahead is not None and readable and self._guess_tokens:
            self.stack.guess_tokens(rows, -(-len(parts) // _LAST))

    @property
    def same_in_chunks(self) -> bool:
        """See Decoder."""
        return not self.exact

    def forward(self, ids: Sequence[int], cache: SequenceCache, *, keep: int = 1) -> Tensor:
        """See Decoder. The native kernels read keys and values in pages."""
        assert isinstance(cache, PagedCache)
        if len(ids) == 1:
            return self.forward_rows([(ids, cache)])
        x = self._prefill(self._embedded(ids), cache.get_seq_length(), cache)
        logits: Tensor = self.lm_head(self.norm(x[-keep:]))
        return logits

    def _embedded(self, ids: Sequence[int]) -> Tensor:
        if self._table is not None and len(ids) <= MAX_ROWS and max(ids) < self._table.count:
            return self._table.rows(ids)
        rows: Tensor = self.model.get_input_embeddings()(torch.tensor(ids))  # images may have changed it
        return rows

    def _prefill(self, x: Tensor, position: int, cache: PagedCache) -> Tensor:
        """x ``[T, H]`` through all layers, two calls each."""
        for layer in cache.paged:
            if not layer.chunk:  # before it is said what is on disk: more may go there for it
                layer.reserve(x.shape[0])
        with self._reading([cache], every=True):
            return self._through_layers(x, position, cache)

    def _through_layers(self, x: Tensor, position: int, cache: PagedCache) -> Tensor:
        cosine, sine = self.angles.span(position, x.shape[0])
        pages = cache.pool.pages
        for attention, run_mlp, layer in zip(self.attentions, self.mlps, cache.paged, strict=True):
            self.check_wanted()
            parts = []
            for first, count in layer.spans(x.shape[0]):
                span = slice(first, first + count)
                angles = (cosine[span], sine[span])
                parts.append(attention.run(x[span], position + first, pages, layer.table, *angles, exact=self.exact))
            x = run_mlp(parts[0] if len(parts) == 1 else torch.cat(parts))
        return x

    def forward_rows(self, rows: Sequence[Row]) -> Tensor:
        """See Decoder: all layers in one call if every expert is resident."""
        segments, places, caches = list[Segment](), list[int](), list[PagedCache]()
        for ids, cache in rows:
            assert isinstance(cache, PagedCache)
            cache.reserve(len(ids))
            position = cache.get_seq_length()
            segments.append(Segment(cache.tables, position, len(ids)))
            places += range(position, position + len(ids))
            caches.append(cache)
        pages = caches[0].pool.pages
        if (
            self.lookahead is not None
            and (
                now := [
                    id(cache) for cache, segment in zip(caches, segments, strict=True) for _ in range(segment.tokens)
                ]
            )
            != self._rows
        ):
            self.lookahead.forget()
            self._rows = now
        self.experts.reap()
        x = self._embedded([token for ids, _ in rows for token in ids])
        cosine, sine = self.angles.of(places)
        self.stack.begin(x, segments, pages, cosine, sine, self.exact, self.lookahead)
        with self._reading(caches, every=False):
            while (stop := self.stack.go()) is not None:
                self.check_wanted()
                self._supply(stop)
        for cache, segment in zip(caches, segments, strict=True):
            cache.advance(segment.tokens)
        self._note()
        logits = self.stack.token_logits
        return self.lm_head(self.norm(x)) if logits is None else logits

    def _reading(self, caches: Sequence[PagedCache], *, every: bool) -> AbstractContextManager[None]:
        """Within, layers may ask for what of ``caches`` is on disk: a layer's after those of the layer before. Unless
        they read ``every`` page, those that see everything may leave some out."""
        disk = caches[0].pool.disk
        if disk is None:
            return nullcontext()
        windows = [attention.shape.window for attention in self.attentions]
        by_layer = zip(windows, *(cache.stretches(windows) for cache in caches), strict=True)
        order = [(one, every or window > 0) for window, *layer in by_layer for found in layer for one in found]
        return disk.step(order, self.check_wanted)

    def _supply(self, stop: Stop) -> None:
        """Begin the reads that a step waits for, and those that its coming layers will."""
        self.experts.reap()
        waiting = [(stop.finished, expert) for expert in stop.waiting]
        there = [key for key in waiting if self.experts.whole(key)]
        locked = self.experts.demand([key for key in waiting if key not in there], there) if waiting else set()
        if stop.wanted:
            self.experts.prefetch(stop.wanted, locked)
        if stop.wanted_next or not stop.attended:  # at a token's start: what the last one guessed is over
            self.experts.prefetch(stop.wanted_next, locked | set(stop.wanted), Priority.NEXT)

    def _note(self) -> None:
        """Count what the rows of a step chose, each expert of a layer once, and what it had to wait for."""
        if not self._moe_layers:
            return
        chosen = self.stack.chosen_by_all().astype(np.int64)
        self.routing.record_step(chosen.swapaxes(0, 1))  # [T, L, k]
        used = chosen.reshape(len(chosen), -1).tolist()
        if chosen.shape[1] > 1:  # a token never chooses an expert twice
            used = [sorted(set(of_layer)) for of_layer in used]
        self.experts.count_served(self._moe_layers, used, self.stack.late_by_layer())

    def _head(self) -> Head | None:
        if not isinstance(self.lm_head, QuantLinear) or self.lm_head.bias is not None:
            return None
        weight = self.lm_head.stored.descriptor  # None for f16, which torch multiplies
        return None if weight is None else Head(self.norm.weight.data, norm_eps(self.norm), weight)


def _attention(part: LayerParts) -> Attention:
    linears = (part.q_proj, part.k_proj, part.v_proj, part.o_proj)
    q, k, v, o = map(_weight, linears)
    down = None if part.q_down is None else _weight(part.q_down)
    biases = ((part.q_down or part.q_proj).bias, part.k_proj.bias, part.v_proj.bias, part.o_proj.bias)
    return Attention(part.shape, q, k, v, o, part.attention_norm, part.q_norm, part.k_norm, biases, part.sinks, down)


def _moe_block(part: LayerParts, router: Router, join: SwiGlu) -> MoeBlock:
    weight = Weight.from_tensors("f32", router.weight.float().contiguous())
    shared, gate = None if part.mlp is None else _gated(part.mlp), part.shared_router
    return MoeBlock(
        weight,
        router.top_k,
        router.selection,
        shared,
        None if gate is None else Weight.from_tensors("f32", gate.float().contiguous()),
        part.mlp_norm,
        part.eps,
        router.bias,
        join,
        router.correction,
    )


def _dense_mlp(part: LayerParts, gated: GatedMlp, exact: bool) -> _Mlp:
    job, norm = Job(gated), part.mlp_norm
    return lambda x: mlp([job], rms_norm(x, norm.shape, norm, part.eps), x.clone(), exact=exact)


def _gated(module: Any) -> GatedMlp:
    return GatedMlp(_weight(module.gate_proj), _weight(module.up_proj), _weight(module.down_proj))


def _weight(linear: QuantLinear) -> Weight:
    descriptor = linear.stored.descriptor
    assert descriptor is not None, "every Linear that is loaded is in a form that the native kernels read"
    return descriptor
