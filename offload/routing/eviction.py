"""Which expert to forget when a slot is needed. Pure Python: policies see keys, no tensors and no device.

Keys are (layer, expert). ``touch`` is called on every use, ``victim`` when all slots are taken. All are
deterministic.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping

from offload.tiers import Key
from quant.errors import UsageError


class Policy(ABC):
    """Forgets the key whose ``worth`` is least; of equals, the first."""

    @abstractmethod
    def touch(self, key: Key) -> None:
        """``key`` was used."""

    @abstractmethod
    def worth(self, key: Key) -> float:
        """How much ``key`` is worth keeping now; 0 if it was never used."""

    def victim(self, resident: Iterable[Key], locked: set[Key]) -> Key:
        """The resident key to forget; never one of ``locked``, which must leave a choice."""
        # Asked for every miss: one loop, and most keys are told from the best so far by their worth alone.
        best: tuple[float, Key] | None = None
        for key in resident:
            if key in locked:
                continue
            worth = self.worth(key)
            if best is None or worth < best[0] or (worth == best[0] and key < best[1]):
                best = worth, key
        assert best is not None, "locked must leave a choice"
        return best[1]


class LeastRecent(Policy):
    """LRU: forget what was used longest ago; never used goes first."""

    def __init__(self) -> None:
        self._clock = 0
        self._last: dict[Key, int] = {}

    def touch(self, key: Key) -> None:
        self._clock += 1
        self._last[key] = self._clock

    def worth(self, key: Key) -> float:
        return self._last.get(key, 0)


class DecayedFrequency(Policy):
    """LFU with decay: forget what is used least, where a use counts half as much after ``half_life`` touches.

    Scores are kept relative to a growing unit, so that decaying costs nothing per key. ``seed`` gives the
    counts to start from, scaled to what ``half_life`` touches would have built up.
    """

    def __init__(self, half_life: float = 2048, seed: Mapping[Key, float] | None = None) -> None:
        self._growth = 2 ** (1 / half_life)
        self._unit = 1.0
        total = sum(seed.values()) if seed else 0
        balanced = 1 / (1 - 1 / self._growth)  # the sum of all scores once decay and uses balance
        self._score = {key: count / total * balanced for key, count in seed.items()} if seed and total else {}

    def touch(self, key: Key) -> None:
        self._unit *= self._growth
        self._score[key] = self._score.get(key, 0.0) + self._unit
        if self._unit > 1e100:
            self._score = {key: score / self._unit for key, score in self._score.items()}
            self._unit = 1.0

    def worth(self, key: Key) -> float:
        return self._score.get(key, 0.0)


class Blended(Policy):
    """LRU and LFU in one: forget what is least likely to be its layer's next use, by two estimates' mean.

    Each is the part of the layer's uses that were of the key, weighted to halve every ``fast`` or ``slow``
    uses. A layer's clock ticks with its own uses only, so a prompt's scan through the layers ages none before
    it is reached again: what the scan comes to next is not what it evicts. ``seed`` gives counts to start
    from.
    """

    def __init__(self, fast: float = 4, slow: float = 128, seed: Mapping[Key, float] | None = None) -> None:
        self._fast, self._slow = 2 ** (-1 / fast), 2 ** (-1 / slow)
        self._clock: dict[int, int] = {}
        self._parts: dict[Key, tuple[float, float, int]] = {}  # both, as of the layer's clock beside them
        totals: dict[int, float] = {}
        for (layer, _), count in (seed or {}).items():
            totals[layer] = totals.get(layer, 0.0) + count
        for key, count in (seed or {}).items():
            if count:
                self._parts[key] = (count / totals[key[0]], count / totals[key[0]], 0)

    def touch(self, key: Key) -> None:
        now = self._clock[key[0]] = self._clock.get(key[0], 0) + 1
        fast, slow, then = self._parts.get(key, (0.0, 0.0, now))
        fast, slow = fast * self._fast ** (now - then), slow * self._slow ** (now - then)
        self._parts[key] = (fast + 1 - self._fast, slow + 1 - self._slow, now)

    def worth(self, key: Key) -> float:
        """Twice the estimated chance that the layer's next use is of ``key``."""
        parts = self._parts.get(key)
        if parts is None:
            return 0.0
        fast, slow, then = parts
        age = self._clock.get(key[0], 0) - then
        return fast * self._fast**age + slow * self._slow**age


_MAKERS: dict[str, Callable[[Mapping[Key, float] | None], Policy]] = {
    "lru": lambda seed: LeastRecent(),
    "lfu": lambda seed: DecayedFrequency(),
    "blended": lambda seed: Blended(seed=seed),
    "seeded": lambda seed: DecayedFrequency(seed=seed),
}
POLICIES = tuple(_MAKERS)
DEFAULT_POLICY = "blended"


def make_policy(name: str | None, seed_counts: Mapping[Key, float] | None = None) -> Policy:
    """The policy called ``name`` (None: the default). Raises UsageError, also for ``seeded`` without
    counts."""
    check_policy(name, seeded=bool(seed_counts))
    return _MAKERS[name or DEFAULT_POLICY](seed_counts)


def check_policy(name: str | None, *, seeded: bool) -> None:
    """Raise UsageError if no policy is called ``name``, or if it needs a routing profile and is not
    ``seeded`` with one."""
    if name is not None and name not in _MAKERS:
        raise UsageError(f"no cache policy is called {name!r}: expected one of {', '.join(POLICIES)}")
    if name == "seeded" and not seeded:
        raise UsageError("policy 'seeded' starts from a routing profile: give one with --routing FILE")
