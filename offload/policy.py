"""Which expert to forget when a slot is needed. Pure Python: policies see keys, no tensors and no device.

Keys are (layer, expert). ``touch`` is called on every use, ``victim`` when all slots are taken. All are
deterministic.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from quant.errors import UsageError

Key = tuple[int, int]


class Policy(Protocol):
    """What the cache asks."""

    def touch(self, key: Key) -> None:
        """``key`` was used."""

    def victim(self, resident: Iterable[Key], locked: set[Key]) -> Key:
        """The resident key to forget; never one of ``locked``, which must leave a choice."""


class LeastRecent:
    """LRU: forget what was used longest ago; never used goes first."""

    def __init__(self) -> None:
        self._clock = 0
        self._last: dict[Key, int] = {}

    def touch(self, key: Key) -> None:
        self._clock += 1
        self._last[key] = self._clock

    def victim(self, resident: Iterable[Key], locked: set[Key]) -> Key:
        last = self._last
        return min((key for key in resident if key not in locked), key=lambda key: (last.get(key, 0), key))


class DecayedFrequency:
    """LFU with decay: forget what is used least, where a use counts half as much after ``half_life`` touches.

    Scores are kept relative to a growing unit, so that decaying costs nothing per key. ``seed`` gives the
    counts to start from, scaled to what ``half_life`` touches would have built up.
    """

    def __init__(self, half_life: float = 2048, seed: Mapping[Key, float] | None = None) -> None:
        self._growth = 2 ** (1 / half_life)
        self._unit = 1.0
        total = sum(seed.values()) if seed else 0
        settled = 1 / (1 - 1 / self._growth)  # the sum of all scores once decay and uses balance
        self._score = {key: count / total * settled for key, count in seed.items()} if seed and total else {}

    def touch(self, key: Key) -> None:
        self._unit *= self._growth
        self._score[key] = self._score.get(key, 0.0) + self._unit
        if self._unit > 1e100:
            self._score = {key: score / self._unit for key, score in self._score.items()}
            self._unit = 1.0

    def victim(self, resident: Iterable[Key], locked: set[Key]) -> Key:
        score = self._score
        return min((key for key in resident if key not in locked), key=lambda key: (score.get(key, 0.0), key))


_MAKERS: dict[str, Callable[[Mapping[Key, float] | None], Policy]] = {
    "lru": lambda seed: LeastRecent(),
    "lfu": lambda seed: DecayedFrequency(),
    "seeded": lambda seed: DecayedFrequency(seed=seed),
}
POLICIES = tuple(_MAKERS)
DEFAULT_POLICY = "lru"


def make_policy(name: str | None, seed_counts: Mapping[Key, float] | None = None) -> Policy:
    """The policy called ``name`` (None: the default). Raises UsageError, also for ``seeded`` without
    counts."""
    name = name or DEFAULT_POLICY
    if name not in _MAKERS:
        raise UsageError(f"no cache policy is called {name!r}: expected one of {', '.join(POLICIES)}")
    if name == "seeded" and not seed_counts:
        raise UsageError("policy 'seeded' starts from a routing profile: give one with --routing FILE")
    return _MAKERS[name](seed_counts)
