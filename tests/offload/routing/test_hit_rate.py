"""Hit rates foretold from counts and reuse distances are those that a cache has on the same requests."""

import random
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest

from offload.routing.hit_rate import HitRates

LAYERS, EXPERTS, TOKENS = 4, 16, 4000
Draw = Callable[[random.Random, int, int], int]


@dataclass
class Trace:
    """Experts by token and layer, with the statistics that a profile would keep."""

    requests: list[list[int]]
    counts: list[list[int]]
    reuse: list[list[int]]


def trace(draw: Draw) -> Trace:
    rng, last = random.Random(1), [[-1] * EXPERTS for _ in range(LAYERS)]
    made = Trace([], [[0] * EXPERTS for _ in range(LAYERS)], [[0] * 17 for _ in range(LAYERS)])
    before = [0] * LAYERS
    for token in range(TOKENS):
        for layer in range(LAYERS):
            expert = before[layer] = draw(rng, layer, before[layer])
            made.counts[layer][expert] += 1
            if last[layer][expert] >= 0:
                made.reuse[layer][max(0, (token - last[layer][expert] - 1).bit_length())] += 1
            last[layer][expert] = token
        made.requests.append(before[:])
    return made


def lru_hits(requests: list[list[int]], slots: int) -> float:
    held: OrderedDict[tuple[int, int], None] = OrderedDict()
    hits = 0
    for row in requests:
        for key in enumerate(row):
            hits += key in held
            held[key] = None
            held.move_to_end(key)
            if len(held) > slots:
                held.popitem(last=False)
    return hits / (len(requests) * LAYERS)


KINDS: dict[str, Draw] = {
    "uniform": lambda rng, layer, before: rng.randrange(EXPERTS),
    "zipf": lambda rng, layer, before: rng.choices(range(EXPERTS), [1 / (e + 1) for e in range(EXPERTS)])[0],
    "recent": lambda rng, layer, before: before if rng.random() < 0.5 else rng.randrange(EXPERTS),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slots", [8, 16, 32, 48])
def test_reuse_distances_foretell_an_lru(kind: str, slots: int) -> None:
    seen = trace(KINDS[kind])
    assert HitRates.of(64, 1, seen).recent(slots) == pytest.approx(lru_hits(seen.requests, slots), abs=0.035)


@pytest.mark.parametrize("slots", [0, 8, 32, 64, 100])
def test_nothing_known_is_uniform(slots: int) -> None:
    blank = HitRates.of(64, 1, None)
    assert blank.kept(slots) == blank.recent(slots) == blank.hits(slots) == min(1, slots / 64)
    assert not blank.known and blank.hottest((0, 1), 3) == ()


def test_keeping_the_most_used_hits_their_share() -> None:
    seen = Trace([], [[70, 20, 10], [0, 50, 50]], [[0] * 17] * 2)
    known = HitRates.of(6, 1, seen)
    assert known.kept(1) == pytest.approx(0.35)
    assert known.kept(3) == pytest.approx((0.7 + 0.5 + 0.5) / 2)
    assert known.kept(6) == pytest.approx(1)
    assert known.hottest((4, 9), 3) == ((4, 0), (9, 1), (9, 2))


def test_recency_wins_where_the_present_repeats_itself() -> None:
    known = HitRates.of(64, 1, trace(KINDS["recent"]))
    assert known.recent(8) > 3 * known.kept(8)
    assert known.hits(8) == known.recent(8)


@pytest.mark.parametrize("kind", KINDS)
def test_more_slots_never_hit_less(kind: str) -> None:
    known = HitRates.of(64, 1, trace(KINDS[kind]))
    for rate in (known.kept, known.recent, known.hits):
        rates = [rate(slots) for slots in range(65)]
        assert all(later >= earlier - 1e-9 for earlier, later in pairwise(rates))
        assert rates[0] < 0.01 and rates[64] == pytest.approx(1)


@pytest.mark.parametrize("kind", ["uniform", "zipf"])
@pytest.mark.parametrize("sequences", [1, 2, 4, 8])
def test_what_several_sequences_ask_for_is_foretold_with_each_expert_once(kind: str, sequences: int) -> None:
    seen, slots = trace(KINDS[kind]), 24
    known = HitRates.of(64, 1, seen if kind == "zipf" else None)
    kept = set(known.hottest(tuple(range(LAYERS)), slots)) or {(layer, e) for layer in range(LAYERS) for e in range(6)}
    steps = [set[tuple[int, int]]() for _ in range(TOKENS // sequences)]
    for number, row in enumerate(seen.requests[: len(steps) * sequences]):
        steps[number % len(steps)].update(enumerate(row))  # tokens far from each other: they choose independently
    asked, hits = known.together(sequences, EXPERTS, slots)
    assert asked == pytest.approx(sum(map(len, steps)) / len(steps), rel=0.03)
    found = sum(len(step & kept) for step in steps) / sum(map(len, steps))
    assert hits == pytest.approx(found, abs=0.03)
