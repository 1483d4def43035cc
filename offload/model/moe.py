"""The modules that replace a model's MoE blocks: they route as the stock block does and ask the cache for
experts.

Stock Llama 4 runs every expert on every token, scaled by a score that is zero for the unselected; skipping
those is exact. Sums over a token's experts are taken in the router's order, whatever order the experts
arrived in, so the result does not depend on where they were.

Legend: T tokens, H hidden, E experts, k experts per token.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from offload.experts.cache.expert_cache import ExpertCache
from offload.experts.cache.tiered_cache import TieredCache
from offload.experts.storage.store import ExpertWeights
from offload.model.gate import Gate
from offload.model.grouped_moe import GroupedExperts
from offload.routing.frequency import Ids
from offload.routing.stats import RoutingStats
from quant.kernels.moe import GatedMlp, Job, mlp, reads_bias
from quant.kernels.swiglu import SILU, SwiGlu
from quant.linear import Compute, LinearWeight, matmul

Mlp = Callable[[Tensor, ExpertWeights], Tensor]


@dataclass
class ExpertRunner:
    """Runs routed experts of any layer on the weights that the cache serves."""

    cache: ExpertCache
    routing: RoutingStats
    compute: Compute
    scales_input: bool
    gate: Gate = SILU  # what the experts' halves are joined by

    def __post_init__(self) -> None:
        tiered = self.cache if isinstance(self.cache, TieredCache) else None
        self._grouped = None if tiered is None else GroupedExperts(tiered, self.scales_input)

    def run(self, layer: int, x: Tensor, chosen: Tensor, scores: Tensor) -> Tensor:
        """x ``[T, H]``, chosen int64 ``[T, k]``, scores ``[T, k]`` → the routed experts' sum ``[T, H]``."""
        ids = chosen.cpu().numpy()
        self.routing.record(layer, ids)
        grouped = self._grouped if self.gate == SILU and not self.cache.store.shape.expert_bias else None
        if len(chosen) > 1 and x.dtype == torch.bfloat16 and grouped is not None and grouped.reads(layer):
            return grouped.run(layer, x, chosen, ids, scores)
        experts = sorted(set(ids.ravel().tolist()))
        if self._reads_native(x):
            return self._native(layer, x, ids, scores, experts)
        return self.sum_experts(x, chosen, scores, self.cache.stream(layer, experts), self.compute_expert)

    def _reads_native(self, x: Tensor) -> bool:
        """Whether the native kernels compute experts of ``x``, all of them alike."""
        if not (self.compute.native and x.dtype == torch.float32 and x.device.type == "cpu" and not x.requires_grad):
            return False
        return self._stored_natively

    @cached_property
    def _stored_natively(self) -> bool:
        return isinstance(self.gate, SwiGlu) and self.cache.store.reads_native

    def _native(self, layer: int, x: Tensor, ids: Ids, scores: Tensor, experts: list[int]) -> Tensor:
        """As ``run``. Experts that are all there are one native call: threads need not be woken for each."""
        tokens, k = ids.shape
        flat, factors = ids.reshape(-1), scores.reshape(-1).float()
        parts = torch.zeros(tokens * k, x.shape[1])
        # Of a device's cache what is yielded may lie in a staging slot, which the next one takes.
        resident = self._grouped is None and all(self.cache.whole((layer, expert)) for expert in experts)
        jobs: list[Job] = []
        for expert, weights in self.cache.stream(layer, experts):
            places = torch.from_numpy(np.flatnonzero(flat == expert))
            factor = factors[places]
            scale = {"in_scale": factor} if self.scales_input else {"out_weight": factor}
            jobs.append(Job(native_expert(weights, self.gate), places // k, **scale, out_rows=places))
            if not resident:  # what is yielded next may lie where this one does
                mlp(jobs, x, parts, exact=self.compute.exact)
                jobs = []
        if jobs:
            mlp(jobs, x, parts, exact=self.compute.exact)
        return parts if k == 1 else parts.view(tokens, k, -1).sum(1)

    @property
    def compute_expert(self) -> Mlp:
        """One expert of tokens ``[T, H]``."""
        return partial(expert_mlp, compute=self.compute, gate=self.gate)

    def sum_experts(
        self, x: Tensor, chosen: Tensor, scores: Tensor, experts: Iterable[tuple[int, ExpertWeights]], mlp: Mlp
    ) -> Tensor:
        """As ``run``, with the chosen ``experts`` in any order and ``mlp`` to compute one of them."""
        tokens, k = chosen.shape
        out, flat = x.new_empty(tokens * k, x.shape[1]), chosen.reshape(-1)
        for expert, weights in experts:
            rows = (flat == expert).nonzero().squeeze(1)
            score, inputs = scores.reshape(-1, 1)[rows].to(x.dtype), x[rows // k]
            out[rows] = mlp(inputs * score, weights) if self.scales_input else mlp(inputs, weights) * score
        return out if k == 1 else out.view(tokens, k, -1).sum(1)


def expert_mlp(x: Tensor, weights: ExpertWeights, compute: Compute, gate: Gate = SILU) -> Tensor:
    """down(gate(gate_proj(x), up_proj(x))), x ``[T, H]`` → ``[T, H]``."""
    known = compute.native and x.dtype == torch.float32 and isinstance(gate, SwiGlu) and not x.requires_grad
    three = (weights.gate_proj, weights.up_proj, weights.down_proj)
    if known and all(weight.descriptor is not None for weight in three):
        return mlp([Job(native_expert(weights, gate))], x, exact=compute.exact)
    inner = gate(_linear(x, weights.gate_proj, compute), _linear(x, weights.up_proj, compute))
    return _linear(inner, weights.down_proj, compute)


def native_expert(weights: ExpertWeights, join: Gate) -> GatedMlp:
    """The native kernels' descriptors of an expert in a form that they read, its biases where they lie if they can be
    read there."""
    three = (weights.gate_proj, weights.up_proj, weights.down_proj)
    gate, up, down = (weight.descriptor for weight in three)
    assert gate is not None and up is not None and down is not None and isinstance(join, SwiGlu)
    if "bias" not in weights.gate_proj.tensors:
        return GatedMlp(gate, up, down, None, join)
    biases: Any = tuple(weight.tensors["bias"] for weight in three)
    if not all(map(reads_bias, biases)):
        biases = tuple(bias.float().contiguous() for bias in biases)
    return GatedMlp(gate, up, down, biases, join)


def _linear(x: Tensor, weight: LinearWeight, compute: Compute) -> Tensor:
    y, bias = matmul(x, weight, compute), weight.tensors.get("bias")
    return y if bias is None else y + bias.to(y.dtype)


class RoutedLlama4Block(nn.Module):
    """Stands in for ``Llama4TextMoe``: same router, same shared expert, experts from the cache."""

    def __init__(self, stock: nn.Module, layer: int, runner: ExpertRunner) -> None:
        super().__init__()
        self.router = stock.router
        self.shared_expert = stock.shared_expert
        self.top_k: int = int(stock.top_k)  # type: ignore[arg-type]
        self.layer, self.runner = layer, runner

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """``[..., H]`` → (``[T, H]``, router logits ``[T, E]``), as the stock block returns them."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, logits = self.router(x)  # type: ignore[operator]
        top, chosen = torch.topk(logits, self.top_k, dim=1)
        routed = self.runner.run(self.layer, x, chosen, torch.sigmoid(top.float()))
        return routed.add_(self.shared_expert(x)), logits  # type: ignore[operator]


class RoutedExperts(nn.Module):
    """Stands in for the experts of every family with transformers' shared experts interface."""

    def __init__(self, layer: int, runner: ExpertRunner) -> None:
        super().__init__()
        self.layer, self.runner = layer, runner

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``[T, H]``, ``[T, k]``, ``[T, k]`` → ``[T, H]``."""
        return self.runner.run(self.layer, hidden_states, top_k_index, top_k_weights)
