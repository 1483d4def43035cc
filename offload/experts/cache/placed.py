"""The cache that a run plans: which tiers it has, and what lies where at first."""

import torch

from offload.experts.cache.expert_cache import ExpertCache
from offload.experts.cache.mapped_cache import MappedCache
from offload.experts.cache.tiered_cache import TieredCache
from offload.experts.storage.reader import Reader
from offload.experts.storage.store import ExpertStore
from offload.experts.storage.transfer import CudaTransfer, Transfer
from offload.plan.planned_run import PlannedRun
from offload.routing.eviction import make_policy
from offload.routing.frequency import ExpertFrequency


def expert_cache_of(store: ExpertStore, reader: Reader, run: PlannedRun, device: torch.device) -> ExpertCache:
    """The cache that ``run`` plans, empty but for what VRAM begins with."""
    plan, layers, experts = run.plan, store.shape.moe_layers, store.shape.num_experts
    counts = None
    if run.routing is not None:
        counts = dict(zip(store.experts(), run.routing.counts.ravel().tolist(), strict=True))
    policy, frequency = make_policy(run.options.policy, counts), ExpertFrequency(layers, experts, counts)
    if plan.vram_slots:
        transfer = CudaTransfer(device) if device.type == "cuda" else Transfer()
        return TieredCache(
            store,
            reader,
            policy,
            ram_slots=plan.ram_slots,
            vram_slots=plan.vram_slots,
            transfer=transfer,
            frequency=frequency,
            seeds=plan.vram_seeds or frequency.ordered(store.experts()),
            regain=run.options.regain,
        )
    slots, nbytes = plan.ram_slots, None
    if store.expert_nbytes is None:  # they differ in size: as many of the smallest as there is memory for
        nbytes = min(plan.ram_bytes, plan.ram_slots * store.slot_bytes)
        slots = min(store.count, nbytes // store.least_slot_bytes)
    if reader.direct and reader.page_cached and plan.ram_slots >= store.count:
        return MappedCache(store, reader, policy, ram_slots=slots, ram_bytes=nbytes)
    known = frequency if counts else None
    return ExpertCache(store, reader, policy, ram_slots=slots, ram_bytes=nbytes, frequency=known)
