"""DecodeStep: one token through all layers on a device, with no host in between.

Everything it reads and writes lies in buffers made once, so that it can be captured as a CUDA graph;
nothing in it waits for the host but for the answer to a doorbell. What depends on the position is computed
by the host and comes with the token's embedding: RoPE's factors, the position itself, the temperature of
layers without RoPE.

The residual stream is f32; activations between are of the model's dtype. A MoE layer routes on the device,
asks the host for the part of an expert that the device cannot or should not compute, computes the rest and
the shared expert meanwhile, and adds the answer.

Legend: H hidden, E experts, k experts per token, L MoE layers, r rotated channels of a head, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from offload.model.fused_linear import add_product, join, routers_with_next
from offload.model.layer_parts import LayerParts
from quant.errors import SchemeError
from quant.kernels.attention import AttentionShape
from quant.kernels.cuda import bell, fused
from quant.kernels.cuda.attention import AttentionScratch, KvRows, decode_attention
from quant.kernels.cuda.bell import Coming, Nothing, Outlook
from quant.kernels.cuda.doorbell import BellBuffers
from quant.kernels.cuda.experts import ChosenExperts, DecodeScratch, moe_decode
from quant.kernels.cuda.fused import HeadNorms, TokenPlace
from quant.kernels.cuda.layout import ExpertLayout
from quant.kernels.routing import RouterKind


class ExpertTables(Protocol):
    """Where the routed experts are, by MoE layer: see ``moe_decode``."""

    addresses: Tensor  # int64 [L, E]
    places: Tensor  # uint8 [L, E]


class StepInputs:
    """What a step takes from the host, uploaded in one copy: the embedding ``x`` f32 ``[1, H]`` and the token's
    ``place``."""

    def __init__(self, hidden: int, rotated: int, device: torch.device) -> None:
        sizes = [hidden, rotated // 2, rotated // 2, 1, 1]
        self._host = torch.zeros(sum(sizes), pin_memory=device.type == "cuda")
        self._device = torch.zeros(sum(sizes), device=device)
        self._staged = self._host.split(sizes)
        x, cosine, sine, temperature, position = self._device.split(sizes)
        self.x, self.place = x[None], TokenPlace(position.view(torch.int32), cosine, sine, temperature)

    def stage(self, x: Tensor, cosine: Tensor, sine: Tensor, temperature: float, position: int) -> None:
        """Set the next step's inputs, on the host."""
        self._staged[0].copy_(x)
        self._staged[1].copy_(cosine)
        self._staged[2].copy_(sine)
        self._staged[3].fill_(temperature)
        self._staged[4].view(torch.int32).fill_(position)

    @property
    def staged_x(self) -> Tensor:
        """The staged embedding f32 ``[1, H]``, in host memory."""
        staged: Tensor = self._staged[0][None]
        return staged

    def upload(self) -> None:
        """Queue the copy to the device; the staged inputs stay as they are until the step has ended."""
        self._device.copy_(self._host, non_blocking=True)


class _Gated:
    """A gated MLP on every token, added to the residual stream; by the experts' kernels if they read it."""

    def __init__(self, module: Any, device: torch.device) -> None:
        self._module = module
        self._layout: ExpertLayout | None = None
        parts = (module.gate_proj, module.up_proj, module.down_proj)
        if not all(part.scheme.is_packed and part.bias is None for part in parts):
            return
        tensors = [t.data for part in parts for t in (part.weight_packed, part.weight_scale)]
        try:
            self._layout, address = ExpertLayout.of_weights(*tensors)
        except SchemeError:  # gate_proj and up_proj in different schemes: three products instead
            return
        self._as_expert = ChosenExperts(
            chosen=torch.zeros(1, 1, dtype=torch.int32, device=device),
            scores=torch.ones(1, 1, device=device),
            addresses=torch.tensor([address], dtype=torch.int64, device=device),
            places=torch.zeros(1, dtype=torch.uint8, device=device),
            gpu_rows=torch.zeros(1, dtype=torch.int32, device=device),
            scales_input=False,
        )

    @property
    def layout(self) -> ExpertLayout | None:
        return self._layout

    def add(self, x: Tensor, scratch: DecodeScratch | None, out: Tensor) -> None:
        """out f32 ``[1, H]`` += mlp(x ``[1, H]``)."""
        if self._layout is None or scratch is None:
            module = self._module
            out.add_(module.down_proj(silu(module.gate_proj(x)) * module.up_proj(x)))
            return
        moe_decode(x, self._as_expert, self._layout, scratch, out)


@dataclass(frozen=True)
class _Moe:
    row: int
    router: Tensor  # f32 [E, H], and below it, where hints are given, the next MoE layer's
    kind: RouterKind
    asked: ChosenExperts


@dataclass(frozen=True)
class _Layer:
    parts: LayerParts
    qkv: Callable[[Tensor], Tensor] | None  # the three projections in one, where they are stored alike
    rows: KvRows
    norms: HeadNorms | None
    attend: AttentionScratch
    mlp: _Gated | None  # the shared expert, or all of a dense layer
    scratch: DecodeScratch | None
    moe: _Moe | None


class DecodeStep:
    """The step over ``layers``, whose KV buffers are ``rows``, and the experts of ``tables``, stored by
    ``layouts``, one per MoE layer.

    ``gpu_rows`` is how many intermediate features of an expert in pinned host memory are the device's.
    ``hints``: tell the host in every MoE layer what the next one will probably ask of it.
    ``chosen`` int32 ``[L, 1, k]`` and ``logits`` f32 ``[1, V]`` are what it leaves, and ``fetch`` copies to
    the host.
    """

    def __init__(
        self,
        layers: list[LayerParts],
        rows: list[KvRows],
        *,
        norm: tuple[Tensor, float],
        lm_head: Callable[[Tensor], Tensor],
        vocab: int,
        rotated: int,
        tables: ExpertTables,
        layouts: Sequence[ExpertLayout],
        gpu_rows: int,
        buffers: BellBuffers,
        dtype: torch.dtype,
        device: torch.device,
        hints: bool = False,
    ) -> None:
        self._hints = hints
        self.dtype, self.layouts, self.tables, self.buffers = dtype, list(layouts), tables, buffers
        hidden = layouts[0].hidden
        self._norm, self._lm_head = norm, lm_head
        self.inputs = StepInputs(hidden, rotated, device)
        self.gpu_rows = torch.tensor([gpu_rows], dtype=torch.int32, device=device)
        routed = [parts for parts in layers if parts.router is not None]
        top_k = max(p.router.top_k for p in routed if p.router is not None)
        self.chosen = torch.zeros(len(routed), 1, top_k, dtype=torch.int32, device=device)
        self._scores = torch.zeros(len(routed), 1, top_k, device=device)
        self.residual = torch.zeros(1, hidden, device=device)
        self._normed = torch.zeros(1, hidden, device=device)
        self.logits = torch.zeros(1, vocab, device=device)
        pin = device.type == "cuda"
        self.host_chosen = torch.zeros(self.chosen.shape, dtype=torch.int32, pin_memory=pin)
        self.host_logits = torch.zeros(self.logits.shape, pin_memory=pin)
        self._scratch = DecodeScratch.allocate(layouts[0], 1, top_k, device)
        self._layers = self._build(layers, rows, device)

    def _build(self, layers: list[LayerParts], rows: list[KvRows], device: torch.device) -> list[_Layer]:
        attends: dict[int, AttentionScratch] = {}
        scratches: dict[int, DecodeScratch] = {}
        built: list[_Layer] = []
        routed = [(p.router.weight, p.mlp_norm) for p in layers if p.router is not None]
        routers = routers_with_next(routed, self._hints, device)
        row = 0
        for parts, kv in zip(layers, rows, strict=True):
            shape, capacity = parts.shape, kv.keys.shape[1]
            if capacity not in attends:
                attends[capacity] = AttentionScratch.allocate(shape.heads, shape.head_dim, capacity, device)
            mlp = None if parts.mlp is None else _Gated(parts.mlp, device)
            scratch = None
            if mlp is not None and mlp.layout is not None:
                inter = mlp.layout.inter
                scratches[inter] = scratches.get(inter) or DecodeScratch.allocate(mlp.layout, 1, 1, device)
                scratch = scratches[inter]
            moe = None
            if parts.router is not None:
                places = (self.tables.addresses[row], self.tables.places[row], self.gpu_rows)
                asked = ChosenExperts(self.chosen[row], self._scores[row], *places, parts.router.selection.scales_input)
                moe = _Moe(row, routers[row], parts.router.selection.kind, asked)
                row += 1
            norms = None
            if parts.q_norm is not None and parts.k_norm is not None:
                norms = HeadNorms(parts.q_norm.float(), parts.k_norm.float())
            qkv = join((parts.q_proj, parts.k_proj, parts.v_proj))
            if device.type == "cuda":
                torch.cuda.empty_cache()  # what was joined is not to count beside the whole
            built.append(_Layer(parts, qkv, kv, norms, attends[capacity], mlp, scratch, moe))
        return built

    def __call__(self) -> None:
        """One token from ``inputs``; queued on the device, or run by the calling thread on a CPU."""
        x = self.residual
        x.copy_(self.inputs.x)
        for layer in self._layers:
            self._attend(layer, x)
            h = fused.rms_norm(x, layer.parts.mlp_norm, layer.parts.eps, self.dtype, self._normed)
            if layer.moe is not None:
                self._mix(layer, layer.moe, h, x)
            elif layer.mlp is not None:
                layer.mlp.add(h, layer.scratch, x)
        h = fused.rms_norm(x, *self._norm, self.dtype)
        self.logits.copy_(self._lm_head(h))

    def _attend(self, layer: _Layer, x: Tensor) -> None:
        """x ``[1, H]`` += attention(norm(x))."""
        parts, shape, at = layer.parts, layer.parts.shape, self.inputs.place
        h = fused.rms_norm(x, parts.attention_norm, parts.eps, self.dtype)
        if layer.qkv is None:
            q, k, v = parts.q_proj(h), parts.k_proj(h), parts.v_proj(h)
        else:
            width = shape.kv_heads * shape.head_dim
            q, k, v = layer.qkv(h).split([shape.heads * shape.head_dim, width, width], -1)
        query = fused.append(q, k, v, shape, layer.rows, at, layer.norms)
        attended = decode_attention(query, layer.rows, at.position, shape.chunk, scaling(shape), layer.attend)
        add_product(parts.o_proj, attended.view(1, -1), x)

    def _mix(self, layer: _Layer, moe: _Moe, h: Tensor, x: Tensor) -> None:
        """x ``[1, H]`` += moe(h): the host begins before the device does its part."""
        asked, layout = moe.asked, self.layouts[moe.row]
        logits, outlook = self._route(moe)
        fused.select(logits, moe.kind, asked.chosen, asked.scores)
        bell.ring(h, asked, moe.row, layout.inter, self.buffers, outlook)
        moe_decode(h, asked, layout, self._scratch, x)
        if layer.mlp is not None:
            layer.mlp.add(h, layer.scratch, x)
        bell.answer(asked, layout.inter, self.buffers, x)

    def _route(self, moe: _Moe) -> tuple[Tensor, Outlook]:
        """The router's logits f32 ``[1, E]``, and what the next MoE layer's makes of the same input."""
        found = linear(self._normed, moe.router)
        if not self._hints:
            return found, None
        if moe.row + 1 == len(self.layouts):
            return found, Nothing()
        logits, coming = found.chunk(2, -1)
        return logits, Coming(moe.row + 1, coming, self.tables.places[moe.row + 1])

    def fetch(self) -> None:
        """Queue the copy of what the step found to ``host_chosen`` and ``host_logits``."""
        self.host_chosen.copy_(self.chosen, non_blocking=True)
        self.host_logits.copy_(self.logits, non_blocking=True)


def scaling(shape: AttentionShape) -> float:
    """What scores are multiplied by."""
    return shape.scaling or float(shape.head_dim**-0.5)
