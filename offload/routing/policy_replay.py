"""Hit rates of cache policies on a routing trace, and of the best that any policy could do.

The clairvoyant bound (L. A. Belady, 1966) evicts what is needed last; no policy can hit more with as many
slots. A replay is what the runtime's cache does: slots shared by all layers, filled with the first experts on
disk; of what a layer needs, residents are served first, and those in flight do not evict one another.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from offload.routing.eviction import POLICIES, Policy, make_policy
from offload.routing.trace import Trace
from offload.tiers import Key

CLAIRVOYANT = "clairvoyant"
_IN_FLIGHT = 8


@dataclass(frozen=True)
class PolicyHitRates:
    """Hit rates: ``hit_rates[policy][i]`` with ``slots[i]`` slots; the bound is ``CLAIRVOYANT``."""

    trace: Trace
    slots: tuple[int, ...]
    hit_rates: Mapping[str, tuple[float, ...]]

    def best(self, index: int) -> str:
        """The policy that hits most with ``slots[index]`` slots, the bound aside; the first of equals."""
        policies = [name for name in self.hit_rates if name != CLAIRVOYANT]
        return max(policies, key=lambda name: self.hit_rates[name][index])

    def regret(self, policy: str) -> float:
        """How far ``policy`` stays below the bound, averaged over the sizes."""
        pairs = zip(self.hit_rates[CLAIRVOYANT], self.hit_rates[policy], strict=True)
        return sum(bound - rate for bound, rate in pairs) / len(self.slots)


def replay_policies(trace: Trace, slots: Sequence[int], *, chunk: int = 1) -> PolicyHitRates:
    """Replay the second half of ``trace`` with each number of ``slots``; policies that want a profile get
    that of the first half. At least one slot more than a token's experts in a layer is used.
    """
    learned, judged = trace.halves()
    counts = learned.counts()
    rates: dict[str, tuple[float, ...]] = {}
    for name in POLICIES:
        rates[name] = tuple(replay(judged, count, partial(make_policy, name, counts), chunk) for count in slots)
    rates[CLAIRVOYANT] = tuple(clairvoyant(judged, count, chunk) for count in slots)
    return PolicyHitRates(trace, tuple(slots), rates)


def replay(trace: Trace, slots: int, policy: Callable[[], Policy], chunk: int = 1) -> float:
    """The share of requests that find their expert in a cache of ``slots`` run by ``policy``."""
    resident = set(trace.keys[: _enough(trace, slots)])
    window = _window(trace, slots)
    decide = policy()
    hits = total = 0
    for group in trace.requests(chunk):
        ordered = sorted(group, key=lambda key: key not in resident)  # as the runtime: what is there first
        for index, key in enumerate(ordered):
            total += 1
            if key in resident:
                hits += 1
            else:
                resident.remove(decide.victim(resident, set(ordered[index : index + window])))
                resident.add(key)
            decide.touch(key)
    return hits / total


def clairvoyant(trace: Trace, slots: int, chunk: int = 1) -> float:
    """The share of hits of a cache of ``slots`` that always evicts what is needed last."""
    groups = trace.requests(chunk)
    upcoming: dict[Key, list[int]] = {}
    for index in range(len(groups) - 1, -1, -1):
        for key in groups[index]:
            upcoming.setdefault(key, []).append(index)  # the next use is the list's end
    resident = set(trace.keys[: _enough(trace, slots)])
    never = len(groups)
    farthest = [(-_next(upcoming, key, never), key) for key in resident]
    heapq.heapify(farthest)
    hits = total = 0
    for group in groups:
        for key in sorted(group, key=lambda key: key not in resident):
            total += 1
            if key in resident:
                hits += 1
            else:
                resident.remove(_farthest(farthest, resident, upcoming, never))
                resident.add(key)
            upcoming[key].pop()
            heapq.heappush(farthest, (-_next(upcoming, key, never), key))
    return hits / total


def _next(upcoming: Mapping[Key, Sequence[int]], key: Key, never: int) -> int:
    uses = upcoming.get(key)
    return uses[-1] if uses else never


def _farthest(
    heap: list[tuple[int, Key]], resident: set[Key], upcoming: Mapping[Key, Sequence[int]], never: int
) -> Key:
    """Pop the resident key that is needed last; entries that no longer hold are dropped."""
    while True:
        negated, key = heapq.heappop(heap)
        if key in resident and -negated == _next(upcoming, key, never):
            return key


def _enough(trace: Trace, slots: int) -> int:
    return max(slots, trace.top_k + 1)


def _window(trace: Trace, slots: int) -> int:
    """How many of a layer's experts do not evict one another: those in flight, as in the runtime."""
    return max(1, min(_IN_FLIGHT, _enough(trace, slots) - 1))


def sizes_of(trace: Trace, steps: int = 8) -> list[int]:
    """Numbers of slots from a few to all but a few, evenly spread."""
    total = trace.layers * trace.num_experts
    found = {max(trace.top_k + 1, round(total * step / steps)) for step in range(1, steps)}
    return sorted(size for size in found if size < total)
