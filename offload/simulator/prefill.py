"""A prompt, chunk by chunk: what is cold streams in while what is there computes.

Per chunk and layer, experts that have no slot in the fastest tier are fetched once, through ``window``
slots: a copy may run ahead of the computation by as many experts. Large chunks want every expert of a
layer, so the next layer's are begun before its router has spoken.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from offload.simulator.engine import Engine, Event, Line, Process
from offload.simulator.workload import LayerWork, Rates, Work
from offload.tiers import TIERS, Tier

_READ_AHEAD = 8  # experts on their way from disk


@dataclass
class Prompt:
    """Runs prompts through ``work`` on ``rates``; ``shares`` of the experts are in each tier."""

    engine: Engine
    work: Work
    rates: Rates
    shares: Mapping[Tier, float]
    window: int = 8
    _slot: Event | None = field(default=None, init=False)

    def chunk(self, tokens: int, before: int, *, last: bool) -> Process:
        """``tokens`` of a prompt of which ``before`` have been run; the ``last`` chunk ends in logits."""
        plan = list(self._wanted(tokens))
        arrived: dict[tuple[int, int], Event] = {}
        freed: list[Event] = []
        streamed = [
            (layer, index, tier)
            for layer, tiers in enumerate(plan)
            for index, tier in enumerate(tiers)
            if tier != self._home
        ]
        for key in streamed:
            arrived[key[:2]] = Event("disk" if key[2] == "disk" else "pcie", self.engine.now)
        self.engine.start(self._stream(streamed, arrived, freed), "pcie")
        for number, layer in enumerate(self.work.layers):
            yield self.engine.pause(self.rates.layer, "overhead")
            yield from self._layer(layer, number, plan[number], tokens, before, arrived, freed)
        if last:
            yield self._compute("head", self.work.head, self.work.head_weights, 0)
        yield self.engine.pause(self.rates.step, "overhead")

    @property
    def _home(self) -> Tier:
        return "vram" if self.rates.vram else "ram"

    def _wanted(self, tokens: int) -> Iterator[list[Tier]]:
        """For each layer the tiers of the experts that ``tokens`` ask for, those at home first."""
        work, debt = self.work, dict.fromkeys(TIERS, 0.0)
        part = 1 - (1 - work.top_k / work.experts) ** tokens
        for layer in work.layers:
            found: list[Tier] = []
            for tier in TIERS if layer.routes else ():
                debt[tier] += work.experts * part * self.shares.get(tier, 0.0)
                count = round(debt[tier])
                debt[tier] -= count
                found += [tier] * count
            yield found

    def _layer(
        self,
        layer: LayerWork,
        number: int,
        tiers: list[Tier],
        tokens: int,
        before: int,
        arrived: Mapping[tuple[int, int], Event],
        freed: list[Event],
    ) -> Process:
        work = self.work
        attended = min(layer.attended, before + tokens / 2) if layer.attended else 0
        attention = layer.attention_weights * tokens + 2 * tokens * attended * work.attention_width
        yield self._compute("attention", layer.attention, attention, 0)
        yield self._compute("shared", layer.mlp, layer.mlp_weights * tokens, 0)
        each = work.expert_weights * tokens * work.top_k / max(1, len(tiers))
        at_home = tiers.count(self._home)
        yield self._compute("experts", at_home * work.expert, at_home * each, at_home)
        for index, tier in enumerate(tiers):
            if tier != self._home:
                yield arrived[number, index]
                yield self._compute("expert", work.expert, each, 1)
                done = Event("compute", self.engine.now)
                freed.append(done)
                done.happen(self.engine.now)
                self._hand_back()

    def _stream(
        self, wanted: list[tuple[int, int, Tier]], arrived: Mapping[tuple[int, int], Event], freed: list[Event]
    ) -> Process:
        """Fetch ``wanted`` in order, at most ``window`` ahead of what has been computed."""
        engine, disk = self.engine, Line(self.engine)
        reads: dict[int, Event] = {}
        unread = iter([place for place, (_, _, tier) in enumerate(wanted) if tier == "disk"])
        for place, (layer, index, tier) in enumerate(wanted):
            while place - len(freed) >= self.window:
                yield self._wait_for_slot()
            while len(reads) < _READ_AHEAD and (other := next(unread, None)) is not None:
                reads[other] = disk.ask(0, self._read, "disk")
            if tier == "disk":
                yield reads.pop(place)
            if self.rates.vram:
                yield engine.flow("copy", self.work.expert, "pcie", "ram")
            arrived[layer, index].happen(engine.now)

    def _read(self) -> Event:
        return self.engine.flow("read", self.work.expert, "disk", "ram")

    def _wait_for_slot(self) -> Event:
        self._slot = Event("compute", self.engine.now)
        return self._slot

    def _hand_back(self) -> None:
        if self._slot is not None and not self._slot.done:
            self._slot.happen(self.engine.now)

    def _compute(self, what: str, nbytes: float, operations: float, experts: int) -> Event:
        """The longer of reading the weights and multiplying by them; ``operations`` are multiply-adds."""
        engine = self.engine
        if self.rates.vram:
            return engine.join(
                engine.flow(what, 2 * operations, "gpu", cause="compute"), engine.flow(what, nbytes, "vram")
            )
        product = engine.flow(what, 2 * operations, "cpu compute", cause="compute")
        return engine.join(product, engine.flow(what, nbytes, "cpu", "ram"))
