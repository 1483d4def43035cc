"""How a run's plan is made from a checkpoint, and what of it the runtime needs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from offload.experts.storage.store import ExpertStore, find_weight
from offload.hardware.probe import Machine
from offload.plan.plan import Plan, make_plan
from offload.records import RunOptions
from offload.routing.stats import RoutingStats
from offload.tiers import Key
from quant.checkpoint.checkpoint import Checkpoint
from quant.model.families import Role
from quant.model.mixed_precision import joined
from quant.model.tensors import LinearSpec
from quant.scheme import Scheme


@dataclass(frozen=True)
class Placement:
    """How many slots each tier has, which experts the device begins with, and how many intermediate features
    of an expert in RAM are the device's in a decode step (``share``). ``guess_tokens``: guess the next token
    early to read for it, which takes a product with the head. ``warm``: bytes of a coming miss that the CPU
    reads into its caches while a GPU works (0: none)."""

    ram_slots: int
    vram_slots: int = 0
    vram_seeds: tuple[Key, ...] = ()
    prompt_chunk: int = 512
    fills: bool = True
    share: int = 0
    guess_tokens: bool = True
    warm: int = 0


def schemes_of_tensors(checkpoint: Checkpoint) -> Mapping[Role, Scheme]:
    """The scheme of each role, read off the tensors; a MixedPrecision where a role has several."""
    store = ExpertStore(checkpoint)

    def chosen() -> Iterator[tuple[LinearSpec, Scheme]]:
        for spec in checkpoint.shape.dense_linears():
            yield spec, find_weight(checkpoint, spec)[0]
        for layer, expert in store.experts():
            weights = store.record(layer, expert).weights
            for spec in checkpoint.shape.expert_linears(layer, expert):
                assert spec.projection is not None
                yield spec, weights[spec.projection].scheme

    return joined(chosen())


def plan_run(
    checkpoint: Checkpoint,
    options: RunOptions,
    machine: Machine,
    device: torch.device,
    routing: RoutingStats | None = None,
) -> Plan:
    """The plan of a run on ``device`` of ``machine``. Raises BudgetError if it does not fit."""
    return make_plan(
        checkpoint.shape,
        schemes_of_tensors(checkpoint),
        machine,
        vram=options.vram if device.type == "cuda" else 0,
        ram=options.ram,
        context=checkpoint.shape.context(options.context),
        kv_bits=32 if options.exact else 8 if options.kv == "int8" else 16,
        routing=routing,
        prompt_chunk=options.prompt_chunk,
        slot_bytes=ExpertStore(checkpoint).slot_bytes,
        cold="split" if options.graph else "pcie",  # without the graph, what is missed is copied first
    )
