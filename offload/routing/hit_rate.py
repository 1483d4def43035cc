"""HitRates: how often an expert will be found in a cache of a given size, estimated from a routing profile.

Legend: L MoE layers, E experts per layer, N = L · E keys, n slots, T tokens, m(T) the share of requests whose
expert was last used more than T tokens ago.

* Nothing known: every expert is as likely as any other, and n slots of N hit n / N whatever the policy.
* Counts: keeping the n most used experts hits their share of all requests (the best that a fixed choice
  can do).
* Reuse distances: a cache that keeps what was used in the last T tokens holds s(T) = Σ_{j<T} m(j) experts
  of a layer on average and misses m(T) (P. Denning, "The working set model for program behavior", 1968);
  an LRU of n slots behaves like the T at which the layers' s(T) add up to n.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

_LONGEST = 2**17


class Routing(Protocol):
    """What a routing profile must tell; ``RoutingStats`` does.

    ``counts`` ``[L][E]`` requests by expert, ``reuse`` ``[L][bins]`` requests by tokens since the expert
    was last used: 1, 2, 3-4, 5-8 and so on.
    """

    @property
    def counts(self) -> Iterable[Any]: ...

    @property
    def reuse(self) -> Iterable[Any]: ...


@dataclass(frozen=True)
class HitRates:
    """``counts`` ``[L][E]`` and ``gaps`` ``[L][bins]`` as in Routing; both empty where nothing is known."""

    keys: int
    top_k: int
    counts: tuple[tuple[int, ...], ...] = ()
    gaps: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, keys: int, top_k: int, routing: Routing | None) -> "HitRates":
        """From a routing profile, or uniform without one."""
        if routing is None:
            return cls(keys, top_k)
        counts = tuple(tuple(int(count) for count in row) for row in routing.counts)
        gaps = tuple(tuple(int(count) for count in row) for row in routing.reuse)
        return cls(keys, top_k, counts if any(map(sum, counts)) else (), gaps if all(map(sum, gaps)) else ())

    @property
    def known(self) -> bool:
        """Whether there is more than the assumption of uniform use."""
        return bool(self.counts)

    def kept(self, slots: int) -> float:
        """Share of requests that hit if the ``slots`` most used experts are kept."""
        if not self.counts:
            return self._uniform(slots)
        shares = [count / max(1, sum(row)) for row in self.counts for count in row]
        return min(1.0, sum(sorted(shares, reverse=True)[:slots]) / len(self.counts))

    def recent(self, slots: int) -> float:
        """Share of requests that hit in an LRU cache of ``slots``."""
        if not self.gaps or slots >= self.keys:
            return self._uniform(slots)
        tails = [_tail(row) for row in self.gaps]
        held, tokens = 0.0, 0
        while True:
            step = 1 + tokens // 32
            missed = sum(_beyond(tail, tokens + step / 2) for tail in tails)
            if held + missed * self.top_k * step >= slots or tokens > _LONGEST:
                break
            held, tokens = held + missed * self.top_k * step, tokens + step
        window = tokens + ((slots - held) / (missed * self.top_k) if missed else 0.0)
        return 1 - sum(_beyond(tail, window) for tail in tails) / len(tails)

    def shares(self) -> list[float]:
        """The part of all requests that goes to each expert, layer after layer; none if unknown."""
        return [count / max(1, sum(row)) / len(self.counts) for row in self.counts for count in row]

    def hits(self, slots: int) -> float:
        """Share of requests that hit in ``slots`` under a policy that knows both use and recency."""
        return max(self.kept(slots), self.recent(slots)) if self.known else self._uniform(slots)

    def together(self, sequences: int, experts: int, slots: int) -> tuple[float, float]:
        """(layer, expert) pairs that a token of each of ``sequences`` asks for, each once, in layers of ``experts``;
        and the share of them that hits in ``slots``. Sequences are taken to choose independently: n of them ask for an
        expert that a token chooses with probability p with 1 - (1 - p)^n."""
        if not self.counts:
            asked = self.keys * (1 - (1 - self.top_k / experts) ** sequences) if experts else 0.0
            return asked, self._uniform(slots)
        chances = [min(1.0, self.top_k * count / max(1, sum(row))) for row in self.counts for count in row]
        wanted = [1 - (1 - chance) ** sequences for chance in sorted(chances, reverse=True)]
        asked, missed = sum(wanted), sum(wanted[slots:])
        if 0 < (kept := self.kept(slots)) < 1:  # what is recent hits, too
            missed *= (1 - self.hits(slots)) / (1 - kept)
        return asked, 1 - missed / asked if asked else 1.0

    def hottest(self, moe_layers: tuple[int, ...], slots: int) -> tuple[tuple[int, int], ...]:
        """The ``slots`` most used (layer, expert), most used first, ties in layer order; none if unknown."""
        ranked = sorted(
            (-count, layer, expert)
            for layer, row in zip(moe_layers, self.counts, strict=bool(self.counts))
            for expert, count in enumerate(row)
        )
        return tuple((layer, expert) for _, layer, expert in ranked[:slots])

    def _uniform(self, slots: int) -> float:
        return min(1.0, slots / self.keys) if self.keys else 1.0


def _tail(row: Sequence[int]) -> list[float]:
    """Share of requests in bin i and later ones, for every i up to one past the last."""
    total, tail = sum(row), [0.0]
    for count in reversed(row):
        tail.append(tail[-1] + count / total)
    return tail[::-1]


def _beyond(tail: Sequence[float], tokens: float) -> float:
    """m(tokens): bin i holds distances above 2^(i-1) up to 2^i, taken to be spread evenly in it."""
    if tokens <= 1:
        return 1 - tokens * (1 - tail[1])
    lower = min(int(math.log2(tokens)), len(tail) - 2)
    upper = min(lower + 2, len(tail) - 1)
    part: float = min(1.0, tokens / 2**lower - 1)
    return tail[lower + 1] + part * (tail[upper] - tail[lower + 1])
