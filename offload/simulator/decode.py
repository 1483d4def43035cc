"""The decoding of one token after another, as processes that an EventEngine runs.

Beside a GPU the step is one stream of kernels. Where a layer's expert is not in VRAM the doorbell rings,
the host's workers compute their part of it from RAM (fetching it from disk first, if need be) while the GPU
runs the shared expert and then its own part, read in place over PCIe; the layer ends when both have. From one
answer to the next request the host reads into its caches what the next layer will probably ask for. Promotions
to VRAM run on a stream of their own, and what the next layers will want is guessed while a layer waits
for the disk. Without a GPU the CPU does one thing after another, and the disk reads ahead.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from offload.plan.cost_model import FORESEEN
from offload.simulator.event_engine import Event, EventEngine, Line, Process
from offload.simulator.requests import TokenRequests
from offload.simulator.workload import LayerWork, Rates, Work
from offload.tiers import Tier

# How good guesses of coming experts are (quant/kernels/lookahead.py): of the experts that must be read, the
# part that is guessed in time, and how many wrong guesses are read per right one. Fitted to runs of
# mini-scout.
GUESSED = 0.95
WRONG = 0.23
AHEAD = 6
MISS_S = 0.3e-3  # without a GPU: leaving the native step for Python, asking, and going back in


@dataclass
class SimulatedDecode:
    """Runs ``steps`` through ``work`` on ``rates``. ``gpu_part`` of a missed expert is read by the GPU in
    place; ``ahead`` layers are guessed while one waits for the disk (0: none)."""

    engine: EventEngine
    work: Work
    rates: Rates
    gpu_part: float = 0.0
    ahead: int = 0
    seed: int = 0
    disk: Line = field(init=False)

    def __post_init__(self) -> None:
        self.disk = Line(self.engine)
        self._dice = random.Random(self.seed)
        self._coming: dict[tuple[int, int], Event] = {}  # (layer, request) guessed and on its way
        self._seen: set[int] = set()  # layers that were guessed for this token
        self._idle = math.inf  # since when the host could read ahead for the coming layer

    def token(self, step: TokenRequests) -> Process:
        """One decode step."""
        self._coming, self._seen, self._idle = {}, set(), math.inf
        routed = iter(enumerate(step.tiers))
        self._guess(step, -1)  # from the token's embedding
        for layer in self.work.layers:
            index, tiers = next(routed) if layer.routes else (-1, ())
            yield self.engine.pause(self.rates.layer, "overhead")
            if self.rates.vram:
                yield from self._beside_gpu(layer, tiers, step, index)
            else:
                yield from self._on_cpu(layer, tiers, step, index)
        if self.rates.vram:
            yield self.engine.flow("head", self.work.head, "vram")
        else:
            yield self._cpu("head", self.work.head, self.work.head_weights)
        yield self.engine.pause(self.rates.step, "overhead")
        for _ in range(step.swaps):
            self.engine.flow("swap", self.work.expert, "pcie", "ram")
        for _ in range(step.refills):
            self._read(2)

    def _beside_gpu(self, layer: LayerWork, tiers: Sequence[Tier], step: TokenRequests, index: int) -> Process:
        engine, expert = self.engine, self.work.expert
        yield engine.flow("attention", layer.attention + layer.kv, "vram")
        shared_out = [tier for tier in tiers if tier == "ram"]
        on_disk = [place for place, tier in enumerate(tiers) if tier == "disk"]
        host_bytes = len(shared_out) * (1 - self.gpu_part) * expert
        idle = engine.now + self.rates.ring / 2 - self._idle
        host = None
        if host_bytes or on_disk:
            host = engine.start(self._host(host_bytes, self._prefetched(host_bytes, idle), on_disk, step, index))
        if layer.routes:
            self._idle = engine.now
        yield engine.flow("shared", layer.mlp, "vram")
        yield engine.flow("expert", tiers.count("vram") * expert, "vram")
        yield engine.flow("in place", len(shared_out) * self.gpu_part * expert, "pcie", "ram")
        if host is not None:
            yield host

    def _prefetched(self, nbytes: float, idle: float) -> float:
        """How many of a layer's ``nbytes`` in RAM the host has in its caches after ``idle`` seconds, on
        average."""
        if not nbytes:
            return 0.0
        rate = self.rates.cpu_read(nbytes, nbytes * self.work.expert_weights / self.work.expert)
        return FORESEEN * max(0.0, min(idle * rate, self.rates.prefetch_bytes, nbytes))

    def _host(
        self, nbytes: float, prefetched: float, on_disk: Sequence[int], step: TokenRequests, index: int
    ) -> Process:
        """The host's part of a layer: woken by the doorbell, it answers when ``nbytes``, ``prefetched`` of them
        in its caches, and the experts that it has read from disk are computed."""
        work = self.work
        yield self.engine.pause(self.rates.ring / 2, "doorbell")
        awaited = [self._coming.get((index, place)) or self._read(0) for place in on_disk]
        if any(not event.done for event in awaited):
            self._guess(step, index)
        cold = nbytes - prefetched
        yield self._cpu("expert", cold, cold * work.expert_weights / work.expert)
        if prefetched:
            for name in ("cpu", "ram"):  # they were read while nobody else wanted the memory
                self.engine.moved[name] += prefetched
            yield self.engine.pause(prefetched / self.rates.cached, "cpu")
        for event in awaited:
            yield event
            yield self._cpu("expert", work.expert, work.expert_weights)
        self._idle = self.engine.now
        yield self.engine.pause(self.rates.ring / 2, "doorbell")

    def _on_cpu(self, layer: LayerWork, tiers: Sequence[Tier], step: TokenRequests, index: int) -> Process:
        work = self.work
        yield self._cpu("attention", layer.attention + layer.kv, layer.attention_weights)
        on_disk = [place for place, tier in enumerate(tiers) if tier == "disk"]
        awaited = [self._coming.get((index, place)) or self._read(0) for place in on_disk]
        if any(not event.done for event in awaited):
            self._guess(step, index)
            yield self.engine.pause(MISS_S, "overhead")
        yield self._cpu("shared" if layer.routes else "dense", layer.mlp, layer.mlp_weights)
        here = len(tiers) - len(on_disk)
        yield self._cpu("expert", here * work.expert, here * work.expert_weights)
        for event in awaited:
            yield event
            yield self._cpu("expert", work.expert, work.expert_weights)

    def _guess(self, step: TokenRequests, index: int) -> None:
        """Begin to read what the layers after ``index`` will probably ask for."""
        for coming in range(index + 1, min(index + 1 + self.ahead, len(step.tiers))):
            if coming in self._seen:
                continue
            self._seen.add(coming)
            for place, tier in enumerate(step.tiers[coming]):
                if tier == "disk" and self._dice.random() < GUESSED:
                    self._coming[coming, place] = self._read(1)
                    if self._dice.random() < WRONG:
                        self._read(1)

    def _read(self, urgency: int) -> Event:
        return self.disk.ask(urgency, lambda: self.engine.flow("read", self.work.expert, "disk", "ram"), "disk")

    def _cpu(self, what: str, nbytes: float, weights: float) -> Event:
        cap = self.rates.cpu_read(nbytes, weights) if nbytes else 0.0
        return self.engine.flow(what, nbytes, "cpu", "ram", cap=cap)
