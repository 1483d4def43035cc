"""GraphDecoder: a decode step as one launch, on a GPU one CUDA graph.

Prompts go through the model's own modules; a single token through ``DecodeStep``, whose experts are
computed where they are: in VRAM and in pinned RAM by the GPU, in RAM by the CPU, which the step asks
through a doorbell. On a CPU the same step runs in a thread that stands for the GPU.

A step can be launched as soon as its token is known; the books of the one before are kept while it runs.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offload.decode.gpu_step import DecodeStep
from offload.decode.host_worker import HostWorker, Ids
from offload.decode.in_flight import InFlightStep
from offload.decode.runner import GraphThread, StepThread
from offload.experts.cache.tiered_cache import TieredCache
from offload.experts.storage.layout import layer_layout
from offload.experts.storage.store import ExpertStore, find_weight
from offload.hardware.probe import Machine
from offload.model.kv_cache import KVCache
from offload.model.layer_parts import layer_parts, norm_eps
from offload.plan.cost_model import miss_split, rows_of
from offload.routing.stats import RoutingStats
from quant.errors import ColdstreamError, SchemeError
from quant.kernels import native
from quant.kernels.attention import AttentionShape
from quant.kernels.cuda.fused import KvRows
from quant.kernels.doorbell import BellBuffers
from quant.model.shape import ModelShape
from quant.sizes import format_size

_KERNEL_STEP = 32  # features that the device's kernels share out at once


class GraphDecoder:
    """A decoder-only MoE model on ``device``, its experts in ``cache``, tokens in ``kv``.

    ``share`` intermediate features of an expert in pinned RAM are computed by the device, the others by the
    CPU, which reads ``warm`` bytes of what the next layer will probably leave to it into its caches while it
    waits (0: none). Raises SchemeError for experts that its kernels do not read, BudgetError or MachineError
    if the device has no memory for it.
    """

    def __init__(
        self,
        model: Any,
        cache: TieredCache,
        kv: KVCache,
        routing: RoutingStats,
        *,
        share: int,
        dtype: torch.dtype,
        device: torch.device,
        exact: bool = False,
        warm: int = 0,
    ) -> None:
        shape = cache.store.shape
        self.model, self.shape, self.cache, self.kv, self.routing = model, shape, cache, kv, routing
        if share >= shape.expert_intermediate or cache.vram.slots.count - cache.reserve >= cache.store.count:
            warm = 0  # the CPU computes nothing
        self.device, self.warm = device, warm
        layouts = [layer_layout(cache.store, layer) for layer in shape.moe_layers]
        self._parts = [
            layer_parts(layer, model.config, is_moe=index in shape.moe_layers)
            for index, layer in enumerate(model.model.layers)
        ]
        rows = [kv_rows(kv, index, shape, dtype, device) for index in range(shape.num_layers)]
        self._embedding = model.model.embed_tokens
        self._rotary = copy.deepcopy(model.model.rotary_emb).to("cpu")
        self._angles: dict[int, tuple[Tensor, Tensor]] = {}
        self._tuned = next((p.shape for p in self._parts if p.shape.temperature_floor), None)
        buffers = BellBuffers.allocate(1, shape.top_k, shape.hidden_size, device)
        routed = [part for part in self._parts if part.router is not None]
        self.worker = HostWorker(
            buffers,
            cache,
            [p.router for p in routed if p.router is not None],
            [p.mlp_norm for p in routed],
            exact=exact,
            warm=warm,
            share=share,
        )
        norm = model.model.norm
        self.step = DecodeStep(
            self._parts,
            rows,
            norm=(norm.weight.data.float(), norm_eps(norm)),
            lm_head=model.lm_head,
            vocab=shape.vocab_size,
            rotated=2 * self._angles_at(0)[0].numel(),
            tables=cache.tables,
            layouts=layouts,
            share=share,
            buffers=buffers,
            dtype=dtype,
            device=device,
            hints=warm > 0,
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

    @property
    def name(self) -> str:
        """What a report calls it."""
        missed = f"missed experts by native {native.isa()}"
        if self.warm:
            missed += f", up to {format_size(self.warm)} of them read ahead into the CPU's caches"
        if self.device.type == "cuda":
            return f"one CUDA graph per token, bf16 activations; {missed}"
        return f"torch reference in a thread in place of a GPU; {missed}"

    def forward(self, ids: Sequence[int], cache: KVCache, *, keep: int = 1) -> Tensor:
        """Append ``ids`` to the KV cache and return the logits ``[keep, V]`` of the last ``keep`` tokens;
        those of a single token are valid until the next.

        Raises BudgetError if the KV cache is full and CheckpointError if an expert cannot be read.
        """
        assert cache is self.kv, "the step is bound to one KV cache"
        if len(ids) == 1:
            return self._decode(ids[0])
        self.drop()
        self.settle()
        inputs = torch.tensor([list(ids)], device=self.device)
        found = self.model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=keep)
        logits: Tensor = found.logits[0]
        return logits

    @torch.inference_mode()
    def launch(self, token: int) -> None:
        """Begin the step of ``token``, which the next ``forward`` asks for, and keep the books of the one
        before while it runs. What goes wrong with the step is raised by that ``forward``.

        The logits of the one before are valid until here. The cache may be used until ``attend``.
        """
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
        self.settle()

    def attend(self) -> None:
        """From here until the next ``forward`` or ``rest``, the cache belongs to the step that was
        launched."""
        self.flight.attend()

    def synchronize(self) -> None:
        """Wait until a step that was launched has ended; ``forward`` will still have what it found."""
        self.flight.synchronize()

    def drop(self) -> None:
        """Forget a step that was launched: nothing will ask for it. It is as if it had never begun."""
        if self._launched is not None:
            self.flight.abandon()
            self.cache.drop_token()
            self._launched = self._failed = None

    def settle(self) -> None:
        """Keep the books of the last step, if that was not done: learn from it, and count what it used."""
        self._learn()
        if self._uncounted is not None:
            chosen, self._uncounted = self._uncounted, None
            self.routing.record_step(chosen.swapaxes(0, 1))
            self.cache.after_token(chosen)

    @property
    def ended_at(self) -> float:
        """When the last step ended, by ``time.perf_counter``."""
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
        cosine, sine = self._angles_at(position)
        embedding = self._embedding.weight[token]
        self.step.inputs.stage(embedding, cosine, sine, temperature(self._tuned, position), position)
        self.flight.launch()
        # From here on nothing may wait for the device: it may be waiting for this thread.
        self._learn()
        self.worker.look_ahead(self.step.inputs.staged_x)
        self._angles = {position + 1: self._angles_at(position + 1)}

    def _learn(self) -> None:
        """Compare guesses with what the last step chose, before others are made."""
        if self._unlearned is not None:
            chosen, self._unlearned = self._unlearned, None
            self.worker.learn(chosen[:, 0])

    def _angles_at(self, position: int) -> tuple[Tensor, Tensor]:
        """RoPE's cosines and sines f32 ``[r/2]`` at ``position``."""
        if position in self._angles:
            return self._angles[position]
        found = self._rotary(torch.zeros(1, 1, 1), torch.tensor([[position]]))
        if isinstance(found, tuple):  # cosines and sines, repeated for the two halves of a head
            half = found[0].shape[-1] // 2
            return found[0][0, 0, :half], found[1][0, 0, :half]
        return found[0, 0].real, found[0, 0].imag

    def close(self) -> None:
        """End the threads of steps."""
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


def missed_share(store: ExpertStore, machine: Machine, cpu_share: float | None = None) -> int:
    """How many intermediate features of an expert in RAM a GPU of ``machine`` should compute: what a plan
    leaves to it beside ``cpu_share``, or by what reading it in place costs there and computing it costs the
    CPU; 0 without a GPU."""
    if machine.gpu is None:
        return 0
    shape, record = store.shape, store.record(*store.experts()[0])
    group = max(record.weights["down_proj"].scheme.group_size, _KERNEL_STEP)
    if cpu_share is not None:
        return rows_of(1 - cpu_share, shape.expert_intermediate, group)
    shared = 0
    for spec in shape.dense_linears():
        if spec.role == "shared_expert" and spec.layer == shape.moe_layers[0]:
            shared += find_weight(store.checkpoint, spec)[0].nbytes(spec.out_features, spec.in_features)
    split = miss_split(machine, record.nbytes, shape.expert_weights, shared)
    return split.rows(shape.expert_intermediate, group)


def kv_rows(kv: KVCache, layer: int, shape: ModelShape, dtype: torch.dtype, device: torch.device) -> KvRows:
    """The buffers of ``layer``, made now: a graph keeps their addresses."""
    keys, values = kv.kept[layer].key_buffer, kv.kept[layer].value_buffer
    size = (shape.num_kv_heads, shape.head_dim, dtype, device)
    return KvRows(keys.allocate(*size), values.allocate(*size), keys.scale, values.scale)


def temperature(tuned: AttentionShape | None, position: int) -> float:
    """What scales q at ``position`` on layers without RoPE (Llama 4), 1 where nothing does."""
    if tuned is None:
        return 1.0
    steps = math.floor((position + 1) / tuned.temperature_floor)
    return math.log1p(steps) * tuned.temperature_scale + 1.0
