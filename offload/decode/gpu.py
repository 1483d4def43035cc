"""GraphDecoder: a decode step as one launch, on a GPU one CUDA graph.

Prompts go through the model's own modules; a single token through ``DecodeStep``, whose experts are
computed where they are: in VRAM and in pinned RAM by the GPU, in RAM by the CPU, which the step asks
through a doorbell. On a CPU the same step runs in a thread that stands for the GPU.

A step can be launched as soon as its token is known; what the step before used is counted while it runs.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offload.decode.gpu_step import DecodeStep
from offload.decode.host_worker import HostWorker
from offload.decode.in_flight import InFlightStep
from offload.decode.plain import PlainDecoder
from offload.decode.runner import GraphThread, StepThread
from offload.experts.cache.tiered_cache import TieredCache
from offload.experts.storage.layout import layer_layout
from offload.experts.storage.store import ExpertStore
from offload.model.kv_cache import KVCache, SequenceCache
from offload.model.layer_parts import all_layer_parts, norm_eps
from offload.model.rotary import RotaryAngles
from offload.routing.frequency import Ids
from offload.routing.stats import RoutingStats
from quant.errors import ColdstreamError, SchemeError
from quant.kernels import native
from quant.kernels.attention import AttentionShape
from quant.kernels.cuda.attention import KvRows
from quant.kernels.cuda.doorbell import BellBuffers
from quant.model.shape import ModelShape
from quant.sizes import format_size


class GraphDecoder(PlainDecoder):
    """A decoder-only MoE model on ``device``, its experts in ``cache``, tokens in ``kv``.

    ``gpu_rows`` intermediate features of an expert in pinned RAM are computed by the device, the others by the
    CPU, which reads ``prefetch_bytes`` of what the next layer will probably leave to it into its caches while
    it waits (0: none). Raises SchemeError for experts that its kernels do not read, BudgetError or
    MachineError if the device has no memory for it.
    """

    def __init__(
        self,
        model: Any,
        cache: TieredCache,
        kv: KVCache,
        routing: RoutingStats,
        *,
        gpu_rows: int,
        dtype: torch.dtype,
        device: torch.device,
        exact: bool = False,
        prefetch_bytes: int = 0,
    ) -> None:
        shape = cache.store.shape
        if gpu_rows >= shape.expert_intermediate or cache.vram.slots.count >= cache.store.count:
            prefetch_bytes = 0  # the CPU computes nothing
        super().__init__(model, cache, device, _name(device, prefetch_bytes))
        self.shape, self.cache, self.kv, self.routing = shape, cache, kv, routing
        self.bound = kv
        self.prefetch_bytes = prefetch_bytes
        layouts = [layer_layout(cache.store, layer) for layer in shape.moe_layers]
        parts = all_layer_parts(model, shape)
        rows = [kv_rows(kv, index, shape, dtype, device) for index in range(shape.num_layers)]
        self._embedding = model.model.embed_tokens
        self._angles = RotaryAngles(model.model.rotary_emb)
        self._tuned = next((part.shape for part in parts if part.shape.temperature_floor), None)
        buffers = BellBuffers.allocate(1, shape.top_k, shape.hidden_size, device)
        routed = [part for part in parts if part.router is not None]
        self.worker = HostWorker(
            buffers,
            cache,
            [p.router.weight for p in routed if p.router is not None],
            [p.mlp_norm for p in routed],
            exact=exact,
            prefetch_bytes=prefetch_bytes,
            gpu_rows=gpu_rows,
        )
        norm = model.model.norm
        self.step = DecodeStep(
            parts,
            rows,
            norm=(norm.weight.data.float(), norm_eps(norm)),
            lm_head=model.lm_head,
            vocab=shape.vocab_size,
            rotated=2 * self._angles.at(0)[0].numel(),
            tables=cache.vram.address_table,
            layouts=layouts,
            gpu_rows=gpu_rows,
            buffers=buffers,
            dtype=dtype,
            device=device,
            hints=prefetch_bytes > 0,
        )
        bell = self.worker.bell
        self.thread = (
            GraphThread(self.step, device, bell.stop, bell.rearm) if device.type == "cuda" else StepThread(self.step)
        )
        self.flight = InFlightStep(self.worker, self.thread)
        self._launched: int | None = None  # the token whose step has begun and was not asked for yet
        self._failed: Exception | None = None  # what went wrong as it began
        # What the last step chose, int64 [L, 1, k], as far as that was not yet learned from and counted.
        self._unlearned: Ids | None = None
        self._uncounted: Ids | None = None

    def forward(self, ids: Sequence[int], cache: SequenceCache, *, keep: int = 1) -> Tensor:
        """See Decoder. A prompt goes through the model's own modules."""
        assert cache is self.kv, "the step is bound to one KV cache"
        if len(ids) == 1:
            return self._decode(ids[0])
        self.drop()
        self.flush()
        return super().forward(ids, cache, keep=keep)

    @torch.inference_mode()
    def launch(self, token: int) -> bool:
        """See Decoder. What the step before used is counted while this one runs, and the logits of the step
        before are valid until here."""
        self.drop()
        self._launched = token
        try:
            self._begin(token)
        except (ColdstreamError, RuntimeError) as error:
            self.flight.abandon()
            self._failed = error
        except BaseException:  # KeyboardInterrupt above all
            self.drop()
            raise
        self.flush()
        return True

    def attend(self) -> None:
        """See Decoder."""
        self.flight.attend()

    def synchronize(self) -> None:
        """See Decoder."""
        self.flight.synchronize()

    def drop(self) -> None:
        """See Decoder."""
        if self._launched is not None:
            self.flight.abandon()
            self.cache.drop_token()
            self._launched = self._failed = None

    def flush(self) -> None:
        """See Decoder. Guesses are compared with what the step chose, too."""
        self._learn()
        if self._uncounted is not None:
            chosen, self._uncounted = self._uncounted, None
            self.routing.record_step(chosen.swapaxes(0, 1))
            self.cache.after_token(chosen)

    @property
    def ended_at(self) -> float:
        """See Decoder."""
        return self.thread.ended_at

    def _decode(self, token: int) -> Tensor:
        if self._launched != token:
            self.launch(token)
        try:
            failed, self._failed, self._launched = self._failed, None, None
            if failed is not None:
                raise failed
            self.flight.finish()
        except BaseException:
            self.flight.abandon()
            self.cache.drop_token()
            raise
        for layer in self.kv.kept:
            layer.advance(1)
        self.cache.end_token()
        chosen = self.step.host_chosen.numpy().astype(np.int64)  # a copy: the buffer is the next step's
        self._unlearned = self._uncounted = chosen
        return self.step.host_logits

    def _begin(self, token: int) -> None:
        position = self.kv.get_seq_length()
        self.kv.kept[0].check(1)
        self.cache.begin_token()
        cosine, sine = self._angles.at(position)
        embedding = self._embedding.weight[token]
        self.step.inputs.stage(embedding, cosine, sine, temperature(self._tuned, position), position)
        self.flight.launch()
        # From here on nothing may wait for the device: it may be waiting for this thread.
        self._learn()
        self.worker.look_ahead(self.step.inputs.staged_x)
        self._angles.at(position + 1)  # computed while the step runs

    def _learn(self) -> None:
        """Compare guesses with what the last step chose, before others are made."""
        if self._unlearned is not None:
            chosen, self._unlearned = self._unlearned, None
            self.worker.learn(chosen[:, 0])

    def close(self) -> None:
        """See Decoder."""
        self.drop()
        self.flight.close()


def refusal(config: Any, store: ExpertStore) -> str | None:
    """Why a model with ``config`` and the experts of ``store`` cannot be run so; None if it can."""
    if getattr(config, "clip_qkv", None) is not None:
        return "its attention clips q, k and v"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return "its attention slides over a window"
    try:
        for layer in store.shape.moe_layers:
            layer_layout(store, layer)
    except SchemeError as error:
        return str(error)
    return None


def _name(device: torch.device, prefetch_bytes: int) -> str:
    missed = f"missed experts by native {native.isa()}"
    if prefetch_bytes:
        missed += f", up to {format_size(prefetch_bytes)} of them read ahead into the CPU's caches"
    if device.type == "cuda":
        return f"one CUDA graph per token, bf16 activations; {missed}"
    return f"torch reference in a thread in place of a GPU; {missed}"


def kv_rows(kv: KVCache, layer: int, shape: ModelShape, dtype: torch.dtype, device: torch.device) -> KvRows:
    """The buffers of ``layer``, made now: a graph keeps their addresses."""
    keys, values = kv.pieces[layer].key_buffer, kv.pieces[layer].value_buffer
    size = (shape.num_kv_heads, shape.head_dim, dtype, device)
    return KvRows(keys.allocate(*size), values.allocate(*size), keys.scale, values.scale)


def temperature(tuned: AttentionShape | None, position: int) -> float:
    """What scales q at ``position`` on layers without RoPE (Llama 4), 1 where nothing does."""
    if tuned is None:
        return 1.0
    steps = math.floor((position + 1) / tuned.temperature_floor)
    return math.log1p(steps) * tuned.temperature_scale + 1.0
