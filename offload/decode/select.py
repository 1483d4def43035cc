"""Which decoder runs a model: the fastest that reads its weights and computes what its config asks for."""

from typing import Any

import torch

from offload.decode.cpu import NativeDecoder
from offload.decode.decoder import Decoder
from offload.decode.gpu import GraphDecoder, refusal
from offload.decode.plain import PlainDecoder
from offload.experts.cache.oom import retry_with_less_vram
from offload.experts.cache.tiered_cache import TieredCache
from offload.model.moe import ExpertRunner
from offload.plan.plan import Plan
from quant.kernels.swiglu import SwiGlu


def select_decoder(
    model: Any, plan: Plan, runner: ExpertRunner, kv: Any, device: torch.device, *, graph: bool
) -> tuple[Decoder, list[str]]:
    """The decoder of transformers' ``model``, whose experts ``runner`` runs, and what a user should know of the choice.
    ``graph``: decode with one launch per token where experts are on a device. Raises BudgetError or MachineError if the
    device has no memory for it."""
    experts, routing, compute, gate = runner.cache, runner.routing, runner.compute, runner.gate
    store, notes = experts.store, list[str]()
    bound = None if store.shape.keeps_pages else kv
    if compute.native and not plan.vram_slots and NativeDecoder.reads(model.config, store, gate):
        assert isinstance(gate, SwiGlu)
        decoder = NativeDecoder(
            model, store.shape, experts, routing, compute, guess_tokens=plan.guess_tokens, join=gate
        )
        return decoder, notes
    if not store.shape.is_native:
        said = ("attention and routing", "are") if store.shape.moe_layers else ("attention", "is")
        notes.append(
            f"{said[0]} of a {store.shape.family.name} model {said[1]} computed by transformers' own modules, "
            "with about a millisecond of Python per layer and token"
        )
    if graph and store.shape.is_native and isinstance(experts, TieredCache):
        reason = refusal(model.config, store)
        if reason is None:
            return retry_with_less_vram(
                lambda: GraphDecoder(
                    model,
                    experts,
                    kv,
                    routing,
                    gpu_rows=plan.gpu_rows,
                    dtype=torch.float32 if device.type == "cpu" else torch.bfloat16,
                    device=device,
                    exact=compute.exact,
                    prefetch_bytes=plan.prefetch_bytes,
                ),
                experts,
            ), notes
        notes.append(f"decoding waits for the host in every layer instead of running as one CUDA graph: {reason}")
    if device.type == "cuda":
        return PlainDecoder(model, experts, device, compute.name, bound), notes
    if compute.native and store.reads_native:
        return PlainDecoder(model, experts, device, f"transformers' modules, {compute.name}", bound), notes
    notes.append(
        "experts stored like these are dequantized by torch or bitsandbytes before each use, many times slower "
        "than the native kernels on int4 and int8: the prediction does not count that"
    )
    return PlainDecoder(model, experts, device, "torch, dequantized weights", bound), notes
