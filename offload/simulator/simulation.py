"""Simulation: a run of a model on a machine that need not be there, event by event, and where its time goes.

The cost model (``offload/plan/cost_model.py``) divides bytes by bandwidths; this follows what the runtime does: where
each expert of each token is, what runs at the same time, which copies share a bandwidth, what waits for what. It needs
the same things (a shape, schemes, a machine, a plan) and, where there is one, a routing trace. No weights are read
and nothing is multiplied: it is pure Python, and simulating a token of Scout takes some milliseconds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from offload.hardware.probe import Machine
from offload.plan.cost_model import miss_split, read_ahead_s, scan_hits
from offload.plan.footprint import Footprint
from offload.plan.plan import Plan
from offload.plan.speed_prediction import Limit
from offload.routing.eviction import make_policy
from offload.routing.trace import Trace
from offload.simulator.decode import AHEAD, SimulatedDecode
from offload.simulator.event_engine import EventEngine, Process, Span
from offload.simulator.prefill import Prompt
from offload.simulator.requests import Tiers, TokenRequests, drawn, replayed, shares, stretched
from offload.simulator.workload import Rates, Work
from offload.tiers import Key, Tier
from quant.model.families import Role
from quant.model.shape import ModelShape
from quant.scheme import Scheme

TOKENS = 64
_WARMUP = 4  # tokens before the timed ones
_FULL = 0.85
# What resources and waits are called where a plan and a report say what limits a run.
_LIMITS: dict[str, Limit] = {
    "vram": "vram bandwidth",
    "ram": "ram bandwidth",
    "cpu": "ram bandwidth",
    "pcie": "pcie",
    "disk": "disk",
    "gpu": "compute",
    "cpu compute": "compute",
    "compute": "compute",
}
_WINDOW = 8  # experts that a prompt streams ahead of what it computes


@dataclass(frozen=True)
class SimulatedPhase:
    """Decoding or a prompt, simulated. ``waited`` are seconds per token by what was waited for and add up to the time;
    ``used`` the share of what a resource could have moved that it did, ``moved`` bytes (operations of
    ``gpu`` and ``cpu compute``) per token through each. ``token_seconds`` lists every token, ``spans`` what
    the lanes did in a typical one, from its start. ``hit_rates`` are the shares of requests by tier."""

    tokens: int
    tokens_per_s: float
    waited: Mapping[str, float]
    used: Mapping[str, float]
    moved: Mapping[str, float]
    hit_rates: Mapping[Tier, float]
    swaps_per_token: float = 0.0
    token_seconds: tuple[float, ...] = ()
    spans: tuple[Span, ...] = ()

    @property
    def limited_by(self) -> Limit:
        """The resource that was in use nearly all the time, or what most time was waited for."""
        fullest = max(self.used, key=lambda name: self.used[name])
        if self.used[fullest] >= _FULL:
            return _LIMITS.get(fullest, "overhead")
        return _LIMITS.get(max(self.waited, key=lambda cause: self.waited[cause]), "overhead")

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the spans."""
        data = asdict(replace(self, spans=()))
        del data["spans"]
        return {**data, "ms_per_token": 1e3 / self.tokens_per_s, "limited_by": self.limited_by}


@dataclass(frozen=True)
class Simulation:
    """A model placed by ``plan`` on ``machine``, whose runs can be simulated. The GPU computes ``gpu_part`` of each
    expert that is not in VRAM (None: what the rates say is best); at most ``swaps`` experts are copied into VRAM per
    token."""

    footprint: Footprint
    plan: Plan
    machine: Machine
    gpu_part: float | None = None
    swaps: int = 0

    @classmethod
    def of(
        cls,
        shape: ModelShape,
        schemes: Mapping[Any, Scheme],
        plan: Plan,
        machine: Machine,
        wider: Mapping[Role, int] | None = None,
        **more: Any,
    ) -> Self:
        """Of the model of ``shape``, stored by ``schemes`` and what is kept in f32 (``wider``), as it was planned."""
        machine = machine if plan.vram else replace(machine, gpu=None)
        footprint = Footprint(shape, schemes, plan.context, plan.kv_bits, plan.slot_bytes, wider=wider or {})
        return cls(footprint, plan, machine, **more)

    @property
    def part(self) -> float:
        """Of a missed expert, what the GPU reads in place."""
        if self.machine.gpu is None:
            return 0.0
        if self.gpu_part is not None:
            return self.gpu_part
        rates = self.plan.hit_rates
        load = self.footprint.load(
            filled=self.plan.filled, vram_hits=rates["vram"], hits=1 - rates["disk"], resident=1.0
        )
        ahead = read_ahead_s(load, self.machine)
        return miss_split(self.machine, load.expert, load.expert_weights, load.shared, ahead).gpu_part

    def decode(
        self,
        tokens: int = TOKENS,
        *,
        trace: Trace | None = None,
        counts: Mapping[Key, float] | None = None,
        policy: str | None = None,
    ) -> SimulatedPhase:
        """Decode ``tokens`` one by one. Experts are where ``trace`` finds them (``counts``, by layers as the
        trace counts them, seed the placement), or by the plan's hit rates without one."""
        steps = self.steps(tokens, trace, counts, policy)
        work = Work.of(self.footprint, self.plan.filled)
        rates = Rates.of(self.machine, nf4=work.nf4, stock=work.stock, stock_on_gpu=work.stock_on_gpu)
        engine = EventEngine(rates.table())
        decoder = SimulatedDecode(engine, work, rates, self.part, AHEAD)
        warmup = min(_WARMUP, len(steps) - 1)
        meter = _Meter(engine)
        for step in steps[:warmup]:
            meter.play(decoder.token(step))
        steps = steps[warmup:]
        meter, typical = _Meter(engine), _typical(steps)
        took: list[float] = []
        spans: tuple[Span, ...] = ()
        for index, step in enumerate(steps):
            engine.watching = index == typical
            since = engine.now
            meter.play(decoder.token(step))
            took.append(engine.now - since)
            if engine.watching:
                spans = tuple(replace(s, start=max(0.0, s.start - since), end=s.end - since) for s in engine.spans)
        swaps = sum(step.swaps for step in steps) / len(steps)
        return meter.phase(len(steps), shares(steps), swaps_per_token=swaps, token_seconds=tuple(took), spans=spans)

    def steps(
        self,
        tokens: int,
        trace: Trace | None = None,
        counts: Mapping[Key, float] | None = None,
        policy: str | None = None,
    ) -> list[TokenRequests]:
        """Where each of ``tokens`` (and a few before them) finds its experts."""
        shape, plan = self.footprint.shape, self.plan
        layers, wanted = len(shape.moe_layers), tokens + _WARMUP
        if trace is None:
            return drawn(plan.hit_rates, layers, shape.top_k, wanted)
        tiers = Tiers(
            trace=stretched(trace, layers, wanted),
            vram_slots=plan.vram_slots - plan.vram_reserve,
            ram_slots=plan.ram_slots,
            policy=lambda: make_policy(policy, counts),
            counts=counts,
            swaps=self.swaps,
            sizes=self._sizes(),
            ram_bytes=plan.ram_bytes,
        )
        return replayed(tiers, wanted)

    def _sizes(self) -> dict[Key, int] | None:
        """What each expert takes in RAM where that is what it needs; None where all slots are of one size, as beside a
        GPU."""
        shape, taken = self.footprint.shape, self.footprint.taken_sizes
        if self.machine.gpu is not None or not taken:
            return None
        keys = ((layer, expert) for layer in range(len(shape.moe_layers)) for expert in range(shape.num_experts))
        return dict(zip(keys, taken, strict=True))

    def prefill(self, tokens: int | None = None) -> SimulatedPhase:
        """A prompt of ``tokens``, by default as many as the plan predicts for."""
        plan, tokens = self.plan, tokens or self.plan.filled
        work, found = Work.of(self.footprint, tokens), self._scan_shares()
        rates = Rates.of(self.machine, nf4=work.nf4, stock=work.stock, stock_on_gpu=work.stock_on_gpu)
        engine = EventEngine(rates.table(), watching=True)
        prompt = Prompt(engine, work, rates, found, _WINDOW)
        meter = _Meter(engine)
        for done in range(0, tokens, plan.prompt_chunk):
            step = min(plan.prompt_chunk, tokens - done)
            meter.play(prompt.chunk(step, done, last=done + step == tokens))
        return meter.phase(tokens, found, spans=tuple(engine.spans))

    def _scan_shares(self) -> dict[Tier, float]:
        """Where a prompt finds experts, of which it wants all: by slots, whatever is hot."""
        plan, experts = self.plan, self.plan.experts or 1  # none in a dense model
        vram = (plan.vram_slots - plan.vram_reserve) / experts
        held = min(1.0, vram + plan.ram_slots / experts)
        hits = max(vram, scan_hits(held))
        return {"vram": vram, "ram": hits - vram, "disk": 1 - hits}


class _Meter:
    """Plays processes one after another; what ``engine`` does meanwhile is counted."""

    def __init__(self, engine: EventEngine) -> None:
        self._engine, self._since, self._before = engine, engine.now, dict(engine.moved)
        self._waited: dict[str, float] = {}

    def play(self, process: Process) -> None:
        """Run ``process`` to its end."""
        running = self._engine.start(process)
        self._engine.run(running)
        for start, end, cause in running.log:
            self._waited[cause] = self._waited.get(cause, 0.0) + (end - start)

    def phase(self, tokens: int, hit_rates: Mapping[Tier, float], **more: Any) -> SimulatedPhase:
        """What was played, which were ``tokens`` tokens."""
        engine, seconds = self._engine, self._engine.now - self._since
        moved = {name: engine.moved[name] - self._before[name] for name in engine.moved}
        return SimulatedPhase(
            tokens=tokens,
            tokens_per_s=tokens / seconds,
            waited={cause: waited / tokens for cause, waited in self._waited.items()},
            used={name: amount / engine.rates[name] / seconds for name, amount in moved.items()},
            moved={name: amount / tokens for name, amount in moved.items()},
            hit_rates=hit_rates,
            **more,
        )


def _typical(steps: Sequence[TokenRequests]) -> int:
    """The step that finds in VRAM, and off it, about as much as most do."""
    found = [sum(tiers.count("vram") * 100 + tiers.count("ram") for tiers in step.tiers) for step in steps]
    middle = sorted(found)[len(found) // 2]
    return min(range(len(found)), key=lambda index: abs(found[index] - middle))
