"""A prompt, chunk by chunk: experts that are not in the fastest tier arrive while those that are compute.

Per chunk and layer each of them is fetched once, through ``window`` slots: copies may run that many experts ahead
of the computation. Large chunks want every expert of a layer, so copies for the next layer begin before its router
has chosen.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from offload.simulator.event_engine import Event, EventEngine, Line, Process
from offload.simulator.workload import LayerWork, Rates, Work
from offload.tiers import TIERS, Tier

_READ_AHEAD = 8  # experts on their way from disk


@dataclass
class Prompt:
    """Runs prompts through ``work`` on ``rates``; ``shares`` of the experts are in each tier."""

    engine: EventEngine
    work: Work
    rates: Rates
    shares: Mapping[Tier, float]
    window: int = 8
    _slot: Event | None = field(default=None, init=False)  # happens when a slot is free
    _computed: int = field(default=0, init=False)  # of the experts that this chunk streams

    def chunk(self, tokens: int, before: int, *, last: bool) -> Process:
        """``tokens`` of a prompt of which ``before`` have been run; the ``last`` chunk ends in logits."""
        plan = list(self._wanted(tokens))
        streamed = [[tier for tier in tiers if tier != self._home] for tiers in plan]
        arrivals = [
            [Event("disk" if tier == "disk" else "pcie", self.engine.now) for tier in tiers] for tiers in streamed
        ]
        self._computed = 0
        self.engine.start(self._stream(list(chain(*streamed)), list(chain(*arrivals))), "pcie")
        for layer, tiers, arriving in zip(self.work.layers, plan, arrivals, strict=True):
            yield self.engine.pause(self.rates.layer, "overhead")
            yield from self._layer(layer, len(tiers), arriving, tokens, before)
        if last:
            yield self._compute("head", self.work.head, self.work.head_weights)
        yield self.engine.pause(self.rates.step, "overhead")

    @property
    def _home(self) -> Tier:
        return "vram" if self.rates.vram else "ram"

    def _wanted(self, tokens: int) -> Iterator[list[Tier]]:
        """For each layer the tiers of the experts that ``tokens`` ask for, the fastest first."""
        work, debt = self.work, dict.fromkeys(TIERS, 0.0)
        part = 1 - (1 - work.top_k / work.experts) ** tokens if work.experts else 0.0
        for layer in work.layers:
            found: list[Tier] = []
            for tier in TIERS if layer.routes else ():
                debt[tier] += work.experts * part * self.shares.get(tier, 0.0)
                count = round(debt[tier])
                debt[tier] -= count
                found += [tier] * count
            yield found

    def _layer(self, layer: LayerWork, experts: int, arriving: Sequence[Event], tokens: int, before: int) -> Process:
        """One layer, whose ``experts`` are there but for those ``arriving``."""
        work = self.work
        attended = min(layer.attended, before + tokens / 2) if layer.attended else 0
        attention = layer.attention_weights * tokens + 2 * tokens * attended * work.attention_width
        yield self._compute("attention", layer.attention, attention)
        yield self._compute("shared", layer.mlp, layer.mlp_weights * tokens)
        each = work.expert_weights * tokens * work.top_k / max(1, experts)
        at_home = experts - len(arriving)
        yield self._compute("experts", at_home * work.expert, at_home * each)
        for arrived in arriving:
            yield arrived
            yield self._compute("expert", work.expert, each)
            self._computed += 1
            if self._slot is not None and not self._slot.done:
                self._slot.happen(self.engine.now)

    def _stream(self, tiers: Sequence[Tier], arrivals: Sequence[Event]) -> Process:
        """Fetch experts from ``tiers`` in order, at most ``window`` ahead of what has been computed."""
        engine, disk = self.engine, Line(self.engine)
        reads: dict[int, Event] = {}
        unread = iter([place for place, tier in enumerate(tiers) if tier == "disk"])
        for place, tier in enumerate(tiers):
            while place - self._computed >= self.window:
                self._slot = Event("compute", engine.now)
                yield self._slot
            while len(reads) < _READ_AHEAD and (other := next(unread, None)) is not None:
                reads[other] = disk.ask(0, self._read, "disk")
            if tier == "disk":
                yield reads.pop(place)
            if self.rates.vram:
                yield engine.flow("copy", self.work.expert, "pcie", "ram")
            arrivals[place].happen(engine.now)

    def _read(self) -> Event:
        return self.engine.flow("read", self.work.expert, "disk", "ram")

    def _compute(self, what: str, nbytes: float, operations: float) -> Event:
        """The longer of reading the weights and multiplying by them; ``operations`` are multiply-adds."""
        engine = self.engine
        if self.rates.vram:
            return engine.join(
                engine.flow(what, 2 * operations, "gpu", cause="compute"), engine.flow(what, nbytes, "vram")
            )
        product = engine.flow(what, 2 * operations, "cpu compute", cause="compute")
        return engine.join(product, engine.flow(what, nbytes, "cpu", "ram"))
