"""Where each expert lies when a token asks for it: drawn from shares, or replayed from a routing trace.

A replay keeps track of three tiers. VRAM starts with the hottest experts of a profile (or the first of every layer);
after each token, at most ``swaps`` of the experts that were not there take the place of less used ones, if they are
used clearly more. Slots in RAM hold others under a cache policy; experts that differ in size share its bytes. What has
no slot is on disk.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from offload.routing.eviction import Policy
from offload.routing.trace import Trace
from offload.tiers import TIERS, Key, Tier

_GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class TokenRequests:
    """One token: ``tiers[l]`` of the experts that it asks the l-th MoE layer for, ``swaps`` the experts that
    are copied to VRAM after it, ``refills`` those that are read into host slots for what left VRAM."""

    tiers: tuple[tuple[Tier, ...], ...]
    swaps: int = 0
    refills: int = 0


def drawn(shares: Mapping[Tier, float], layers: int, top_k: int, steps: int) -> list[TokenRequests]:
    """Steps whose requests fall on the tiers by ``shares``, spread as evenly as can be."""
    edges = [(tier, sum(shares.get(t, 0.0) for t in TIERS[: index + 1])) for index, tier in enumerate(TIERS)]
    numbers = _spread()

    def tier() -> Tier:
        place = next(numbers)
        return next((tier for tier, edge in edges if place < edge), edges[-1][0])

    return [TokenRequests(tuple(tuple(tier() for _ in range(top_k)) for _ in range(layers))) for _ in range(steps)]


def _spread() -> Iterator[float]:
    """Numbers between 0 and 1, every stretch of them spread evenly (Kronecker's sequence)."""
    place = 0.5
    while True:
        yield place
        place = (place + _GOLDEN) % 1.0


@dataclass
class Tiers:
    """The state of a replay: which keys are in VRAM and in host slots, and how much each was used of late.

    Where experts differ in size, by ``sizes`` in bytes, those in RAM take ``ram_bytes`` together at the most, whatever
    their number: as ``SlotTable`` counts.
    """

    trace: Trace
    vram_slots: int
    ram_slots: int
    policy: Callable[[], Policy]
    counts: Mapping[Key, float] | None = None
    swaps: int = 0
    sizes: Mapping[Key, int] | None = None
    ram_bytes: int = 0
    half_life: float = 64  # tokens
    margin: float = 1.5  # a swap costs a copy: what comes in was used this much more than what goes
    vram: set[Key] = field(init=False)
    ram: set[Key] = field(init=False)

    def __post_init__(self) -> None:
        keys = _even(self.trace)
        if self.counts:
            counts = self.counts
            keys = sorted(keys, key=lambda key: -counts.get(key, 0))
        self.vram = set(keys[: self.vram_slots])
        self._left = self.ram_slots if self.sizes is None else self.ram_bytes
        self._keeps_all = sum(map(self._size, keys)) <= self._left  # then what leaves VRAM is in RAM, too
        self._refills = not self._keeps_all and self.vram_slots + self.ram_slots >= len(keys)
        self.ram = set()
        for key in keys:
            if key not in self.vram and self._size(key) <= self._left:
                self._admit(key)
        self._host = self.policy()
        self._unit = 1.0
        self._scores: dict[Key, float] = {}
        if self.counts and (total := sum(self.counts.values())):
            requests = self.trace.layers * self.trace.top_k  # of a token
            balanced = requests * self.half_life / 0.693 / total
            self._scores = {key: count * balanced for key, count in self.counts.items()}

    def step(self, token: Sequence[Sequence[int]]) -> TokenRequests:
        """Serve one token, and move what should be."""
        self._unit *= 2 ** (1 / self.half_life)
        tiers: list[tuple[Tier, ...]] = []
        missed: list[Key] = []
        for layer, experts in enumerate(token):
            found: list[Tier] = []
            for expert in experts:
                key = (layer, expert)
                tier: Tier = "vram" if key in self.vram else "ram" if self._in_ram(key) else "disk"
                if tier == "disk" and self.ram_slots:
                    self._fetch(key, {(layer, other) for other in experts})
                if tier != "vram":
                    missed.append(key)
                    self._host.touch(key)
                self._scores[key] = self._scores.get(key, 0.0) + self._unit
                found.append(tier)
            tiers.append(tuple(found))
        swaps = self._swap(missed)
        return TokenRequests(tuple(tiers), swaps, swaps if self._refills else 0)

    def _in_ram(self, key: Key) -> bool:
        return self._keeps_all or key in self.ram

    def _fetch(self, key: Key, locked: set[Key]) -> None:
        while self._size(key) > self._left and self.ram - locked:
            self._release(self._host.victim(self.ram, locked & self.ram))
        if self._size(key) <= self._left:
            self._admit(key)

    def _size(self, key: Key) -> int:
        return 1 if self.sizes is None else self.sizes[key]

    def _admit(self, key: Key) -> None:
        self.ram.add(key)
        self._left -= self._size(key)

    def _release(self, key: Key) -> None:
        self.ram.remove(key)
        self._left += self._size(key)

    def _swap(self, missed: list[Key]) -> int:
        if not (self.swaps and self.vram and missed):
            return 0
        score = self._scores
        done = 0
        hot = sorted(set(missed), key=lambda key: -score[key])
        cold = sorted(self.vram, key=lambda key: score.get(key, 0.0))
        for comes, goes in zip(hot[: self.swaps], cold, strict=False):
            low, high = score.get(goes, 0.0), score[comes]
            # As offload/routing/frequency.py: clearly more, and by more than one request.
            if not self._in_ram(comes) or high <= self.margin * low or high - low <= self._unit:
                break
            self.vram.remove(goes)
            self.vram.add(comes)
            if comes in self.ram:
                self._release(comes)
            if self._refills:
                self._admit(goes)  # read again, into the slot that has come free, before it is next needed
            done += 1
        return done


def replayed(tiers: Tiers, steps: int | None = None) -> list[TokenRequests]:
    """The steps of ``tiers``' trace, or its first ``steps``."""
    return [tiers.step(token) for token in tiers.trace.steps[:steps]]


def shares(steps: Sequence[TokenRequests]) -> dict[Tier, float]:
    """Share of requests by tier."""
    found = dict.fromkeys(TIERS, 0)
    for step in steps:
        for tiers in step.tiers:
            for tier in tiers:
                found[tier] += 1
    total = max(1, sum(found.values()))
    return {tier: found[tier] / total for tier in TIERS}


def stretched(trace: Trace, layers: int, tokens: int) -> Trace:
    """``trace`` for a model of ``layers`` MoE layers, ``tokens`` long: its own layers over and over, each
    turn another stretch of it, so that no two layers choose alike."""
    if trace.layers == layers:
        return trace.head(tokens)
    length = len(trace.steps)
    turns = -(-layers // trace.layers)
    steps = [
        [
            trace.steps[(token + length * (layer // trace.layers) // turns) % length][layer % trace.layers]
            for layer in range(layers)
        ]
        for token in range(min(tokens, length))
    ]
    return Trace(trace.name, trace.num_experts, steps)


def _even(trace: Trace) -> list[Key]:
    """All keys, the first expert of every layer first: where nothing is known, every layer gets the same."""
    return [(layer, expert) for expert in range(trace.num_experts) for layer in range(trace.layers)]
