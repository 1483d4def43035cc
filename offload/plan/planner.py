"""Planner: lays a run into budgets, and compares what else could be: other contexts, a GiB more. Pure Python."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from offload.hardware.probe import Machine
from offload.plan.budget import Budget
from offload.plan.context import ContextPrediction, curve_of, longest_that
from offload.plan.cost_model import KERNEL_STEP, ColdPath, Workload, decode, prefetch_bytes, prefill, rows_of
from offload.plan.footprint import Footprint
from offload.plan.kv_room import KvRoom
from offload.plan.notes import beyond, kv_on_disk, padding, queue, untried
from offload.plan.placement import Fit, Fitter
from offload.plan.plan import Plan
from offload.plan.sequences import SequencePrediction
from offload.plan.speed_prediction import SpeedPrediction
from offload.routing.hit_rate import HitRates, Routing
from offload.tiers import TIERS, Tier
from quant.model.families import Role
from quant.model.mixed_precision import scheme_of
from quant.model.shape import ModelShape
from quant.scheme import Scheme
from quant.sizes import as_bytes

_NOTICEABLE = 0.001
_CHUNK = 1024  # prompt tokens at once, that a longer context may not make fewer
_COUNTS = (1, 2, 4, 8)  # of sequences, that speeds are predicted for


def make_plan(
    shape: ModelShape,
    schemes: Mapping[Role, Scheme],
    machine: Machine,
    *,
    vram: int | str | None = None,
    ram: int | str | None = None,
    context: int | None = None,
    kv_bits: int = 16,
    routing: Routing | None = None,
    prompt_chunk: int | None = None,
    slot_bytes: int | None = None,
    filled: int = 512,
    cold: ColdPath = "split",
    images: bool = False,
    wider: Mapping[Role, int] | None = None,
    sequences: int = 1,
    curve: bool = False,
    kv_room: KvRoom | None = None,
    kv_bounds: bool = False,
) -> Plan:
    """The plan of a run of ``shape`` in ``schemes`` on ``machine``.

    ``vram`` and ``ram`` are budgets in bytes or as people write them ("64GiB"), None for what the machine has;
    ``vram`` 0 leaves the GPU alone. ``context`` None is the longest that costs no speed, 4,096 at
    least and the model's own limit at most.
    ``kv_bits`` is 8, 16 or 32 (exact runs). ``slot_bytes`` is what an expert takes in memory, by default its
    size in whole pages. ``wider`` is what weights kept in f32 take beyond two bytes each, by role. ``images``
    keeps room to look at pictures. ``cold`` says how experts outside VRAM are computed beside a GPU, see ColdPath.
    ``sequences`` of ``context`` tokens each are to have room in the KV cache: fewer, where that is more than fits.
    ``curve`` compares other contexts. With a ``kv_room`` only a part of the KV cache is in RAM, the rest on disk;
    ``kv_bounds`` leaves room for what bounds its keys.
    Raises BudgetError, with the nearest thing that fits, for what does not.
    """
    vram, ram = (None if asked is None else as_bytes(asked) for asked in (vram, ram))
    if vram == 0:
        machine = replace(machine, gpu=None)
    budget = Budget.of(machine, vram, ram)
    least = context or shape.context()
    footprint = Footprint(shape, schemes, least, kv_bits, slot_bytes or 0, images, wider or {})
    footprint = replace(footprint, kv_room=kv_room, kv_bounds=kv_bounds)
    fitter = Fitter(footprint, machine.gpu is not None, prompt_chunk).with_kv_room(budget)
    roomy = (replace(fitter, footprint=replace(footprint, sequences=count)) for count in range(sequences, 1, -1))
    planner = _Planner(
        fitter=next((more for more in roomy if more.fits(budget)), fitter),
        machine=machine,
        locality=HitRates.of(footprint.experts, shape.top_k, routing),
        filled=min(filled, least),
        cold=cold,
    )
    chosen = planner if context else planner.with_context(planner.longest(budget, fitter.grows_to))
    plan = chosen.plan(budget)
    vram_seeds = planner.locality.hottest(shape.moe_layers, plan.vram_slots - plan.vram_reserve)
    return replace(
        plan,
        gains=planner.gains(budget, plan),
        vram_seeds=vram_seeds,
        gpu_rows=_gpu_rows(footprint, machine, plan.decode),
        prefetch_bytes=prefetch_bytes(machine) if machine.gpu else 0,
        guess_tokens=_head_fits_a_wait(footprint, machine),
        notes=(
            *budget.notes,
            *(padding(footprint) if machine.gpu else ()),
            *beyond(shape, plan.context),
            *queue(plan.kv_sequences, sequences, plan.context),
            *kv_on_disk(plan.kv_tiers, plan.total("disk", "kv_cache"), sequences, kv_bounds),
            *untried(schemes, machine),
        ),
        context_asked=context is not None,
        context_limit=max(fitter.grows_to, shape.context()),
        contexts=planner.contexts(budget, plan.context) if curve else (),
    )


def _gpu_rows(footprint: Footprint, machine: Machine, decode: SpeedPrediction) -> int:
    """The part of a missed expert that is not the CPU's, in whole groups of its down projection."""
    if machine.gpu is None or decode.cpu_share is None or not footprint.experts:
        return 0
    shape = footprint.shape
    linears = shape.expert_linears(shape.moe_layers[0], 0)
    down_proj = next(linear for linear in linears if linear.projection == "down_proj")
    group = max(scheme_of(footprint.schemes, down_proj).group_size, KERNEL_STEP)
    return rows_of(1 - decode.cpu_share, shape.expert_intermediate, group)


def _head_fits_a_wait(footprint: Footprint, machine: Machine) -> bool:
    """Whether the head can be read from RAM while one expert is read from the disk."""
    head = footprint.roles().get("lm_head", 0)  # none where it is the embedding
    return 0 < head / machine.ram_gb_s < footprint.slot_bytes / machine.disk_gb_s


@dataclass(frozen=True)
class _Planner:
    fitter: Fitter
    machine: Machine
    locality: HitRates
    filled: int
    cold: ColdPath

    def with_context(self, context: int) -> "_Planner":
        footprint = replace(self.fitter.footprint, context=context)
        return replace(self, fitter=replace(self.fitter, footprint=footprint))

    def longest(self, budget: Budget, limit: int) -> int:
        """The longest context up to ``limit`` with which decode and prefill are as fast as with this one."""
        least = self.fitter.footprint.context
        fit = self.fitter.fit(budget)
        usual = self._speeds(fit, self.filled)

        def fits(context: int) -> bool:
            longer = self.with_context(context)
            if not longer.fitter.fits(budget):
                return False
            room = longer.fitter.fit(budget)
            speeds = zip(longer._speeds(room, self.filled), usual, strict=True)
            return room.prompt_chunk >= min(fit.prompt_chunk, _CHUNK) and all(now >= then for now, then in speeds)

        return longest_that(fits, least, limit)

    def contexts(self, budget: Budget, chosen: int) -> tuple[ContextPrediction, ...]:
        """What contexts beside ``chosen`` cost, as far as they fit."""
        found = []
        for context in curve_of(chosen, self.fitter.grows_to):
            planner = self.with_context(context)
            if planner.fitter.fits(budget):
                fit = planner.fitter.fit(budget)
                usual, _ = planner._speeds(fit, self.filled)
                full, prompt = planner._speeds(fit, context)
                room, kept = planner.fitter.footprint.kv_cache, fit.in_vram + fit.in_ram
                found.append(ContextPrediction(context, room, kept, usual, full, context / prompt))
        return tuple(found)

    def _speeds(self, fit: Fit, filled: int) -> tuple[float, float]:
        """Tokens per second of decode with ``filled`` tokens in the KV cache, and of prefill."""
        load = self._load(fit, filled)[0]
        prompt = prefill(load, self.machine, filled, fit.prompt_chunk)
        return decode(load, self.machine, self.cold).tokens_per_s, prompt.tokens_per_s

    def _load(self, fit: Fit, filled: int) -> tuple[Workload, float, float]:
        """What a token reads, and the shares of requests that find the expert in VRAM, and in VRAM or RAM."""
        vram_hits = self.locality.kept(fit.in_vram)  # VRAM starts with the hottest and changes slowly
        hits = max(vram_hits, self.locality.hits(fit.in_vram + fit.in_ram))
        footprint, resident = self.fitter.footprint, (fit.in_vram + fit.in_ram) / (self.fitter.footprint.experts or 1)
        load = footprint.load(filled=filled, vram_hits=vram_hits, hits=hits, resident=resident, chunk=fit.prompt_chunk)
        return replace(load, expert=footprint.used_bytes(self.locality.shares())), vram_hits, hits

    def plan(self, budget: Budget) -> Plan:
        footprint, fit = self.fitter.footprint, self.fitter.fit(budget)
        load, vram_hits, hits = self._load(fit, self.filled)
        return Plan(
            machine=self.machine.name,
            vram=budget.vram,
            ram=budget.ram,
            context=footprint.context,
            kv_bits=footprint.kv_bits,
            prompt_chunk=fit.prompt_chunk,
            filled=self.filled,
            rows=fit.rows,
            slot_bytes=footprint.slot_bytes,
            experts=footprint.experts,
            vram_slots=fit.vram_slots,
            ram_slots=fit.ram_slots,
            ram_bytes=fit.ram_bytes,
            vram_reserve=fit.vram_slots - fit.in_vram,
            vram_seeds=(),
            hit_rates={"vram": vram_hits, "ram": hits - vram_hits, "disk": 1 - hits},
            routing_known=self.locality.known,
            decode=decode(load, self.machine, self.cold),
            prefill=prefill(load, self.machine, self.filled, fit.prompt_chunk),
            gains={},
            kv_sequences=footprint.sequences,
            together=tuple(self._together(load, fit, count) for count in _COUNTS),
            token_weights=load.token_weights,
            kv_tiers=footprint.kv_tiers(fit.prompt_chunk),
        )

    def _together(self, load: Workload, fit: Fit, count: int) -> SequencePrediction:
        """``count`` sequences, whose tokens share the step of ``load``."""
        asked, hits = self.locality.together(count, load.experts, fit.in_vram + fit.in_ram)
        shared = replace(load, sequences=count, union=asked, hits=hits) if count > 1 else load
        found = decode(shared, self.machine, self.cold)
        union = asked if self.machine.gpu is None else float(load.requests)
        return SequencePrediction(count, found.tokens_per_s, union, found.limited_by)

    def gains(self, budget: Budget, plan: Plan) -> dict[Tier, float]:
        """Decode tokens/s with one more GiB of each tier, where that is more."""
        found: dict[Tier, float] = {}
        for tier in TIERS:
            more = budget.with_one_more_gib(tier)
            if more is not None:
                better = self.plan(more).predicted_tokens_per_s
                if better > plan.predicted_tokens_per_s * (1 + _NOTICEABLE):
                    found[tier] = better
        return found
