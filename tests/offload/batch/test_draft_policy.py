"""Depths by what was measured: deep where drafts are right, none where they do not pay, never a loss that counts."""

import random
from collections.abc import Callable

import pytest

from offload.batch.draft_policy import Acceptance, DraftPolicy, StepTimes

DENSE, ROUTED = 379_000_000, 208_000_000  # bytes of mini-scout's token
EVIDENCE = 20


def union(rows: int) -> float:
    return 16 * (1 - (15 / 16) ** rows)


def in_ram(rows: int) -> float:
    """Seconds as mini-scout takes on two cores: more than its bytes, the arithmetic of rows among them."""
    return (DENSE + ROUTED * union(rows)) / 14e9 * (1 + 0.04 * (rows - 1))


def on_disk(rows: int) -> float:
    return 0.55 * ROUTED * union(rows) / 3e9 + in_ram(rows) / 4


class Text:
    """Tokens of which a drafted one is right with a chance that changes along the text."""

    def __init__(self, chance: Callable[[int], float], seed: int = 0) -> None:
        self._chance, self._random = chance, random.Random(seed)

    def right(self, place: int) -> bool:
        return self._random.random() < self._chance(place)


def run(
    policy: DraftPolicy,
    seconds_of: Callable[[int], float],
    text: Text,
    count: int,
    *,
    disk: bool = False,
    rows: int = 1,
) -> tuple[float, float]:
    """Seconds for ``count`` tokens of each of ``rows`` sequences, and seconds without drafts. What the policy measures
    is disturbed now and then."""
    noise = random.Random(5)
    acceptance = Acceptance(policy.acceptance)
    made, seconds = [0] * rows, 0.0
    while min(made) < count:
        right = [[text.right(place + i) for i in range(9)] for place in made]
        depths = policy.choose([[acceptance.of(EVIDENCE + i) for i in range(9)] for _ in made], 16 - rows)
        took = seconds_of(rows + sum(depths)) * noise.uniform(0.9, 1.1) * (8 if noise.random() < 0.01 else 1)
        before = sum(made)
        for index, depth in enumerate(depths):
            for place, found in enumerate(right[index]):
                acceptance.note(EVIDENCE + place, found)
                if not found:
                    break
            taken = next((i for i in range(depth) if not right[index][i]), depth)
            made[index] += 1 + taken
        read = {"ram": DENSE + int(ROUTED * union(rows)), "disk": int(0.55 * ROUTED * union(rows)) if disk else 0}
        policy.note(rows, sum(depths), sum(made) - before, took, read)  # type: ignore[arg-type]
        seconds += seconds_of(rows + sum(depths))
    return seconds, sum(made) / rows * seconds_of(rows)


def fresh() -> DraftPolicy:
    return DraftPolicy(StepTimes(union, {"ram": 14.0, "disk": 3.0}.get, DENSE))


@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize("chance", [0.0, 0.15, 0.3])
def test_text_that_is_not_foreseen_costs_less_than_a_fiftieth(chance: float, disk: bool) -> None:
    """Whatever is believed before anything was seen."""
    times = on_disk if disk else in_ram
    gains = []
    for seed in range(8):
        seconds, plain = run(fresh(), times, Text(lambda place: chance, seed), 256, disk=disk)
        gains.append(plain / seconds)
    gains.sort()
    assert gains[len(gains) // 2] > 0.98
    assert gains[0] > 0.93


def test_a_text_that_is_mostly_known_is_drafted_deeply() -> None:
    seconds, plain = run(fresh(), in_ram, Text(lambda place: 0.93), 400)
    assert plain / seconds > 1.5
    seconds, plain = run(fresh(), in_ram, Text(lambda place: 0.8), 400)
    assert plain / seconds > 1.25


def test_what_pays_in_ram_does_not_pay_on_disk() -> None:
    """Two tokens read nearly twice as much there."""
    seconds, plain = run(fresh(), on_disk, Text(lambda place: 0.7), 400, disk=True)
    assert plain / seconds > 0.98


def test_drafts_begin_where_a_text_begins_to_be_known() -> None:
    """Nothing is tried meanwhile; what would have been drafted is held against what comes."""
    policy = fresh()
    free = Text(lambda place: 0.05)
    run(policy, in_ram, free, 300)
    seconds, plain = run(policy, in_ram, Text(lambda place: 0.95), 300)
    assert plain / seconds > 1.5


def test_several_sequences_share_the_rows() -> None:
    policy = fresh()
    seconds, plain = run(policy, in_ram, Text(lambda place: 0.93), 200, rows=3)
    assert plain / seconds > 1.1
    depths = policy.choose([[0.99] * 15, [0.05] * 15, []], 13)
    assert depths[0] > 2 and depths[1:] == [0, 0]
    assert sum(policy.choose([[1.0] * 15] * 3, 4)) <= 4


def test_a_measurement_that_was_disturbed_is_forgotten() -> None:
    times = StepTimes(union, {"ram": 14.0}.get, DENSE)  # type: ignore[arg-type]
    for _ in range(10):
        times.note(1, 0.04, {"ram": DENSE + ROUTED})
    times.note(4, 3.0, {"ram": DENSE + ROUTED})
    assert times.of(4) < 0.2  # type: ignore[operator]
    for _ in range(600):
        times.note(1, 0.04, {"ram": DENSE + ROUTED})
    told = 0.04 * (DENSE + ROUTED * union(4)) / (DENSE + ROUTED)
    assert times.of(4) == pytest.approx(told, rel=0.1)


def test_nothing_is_drafted_before_a_step_was_measured() -> None:
    assert fresh().choose([[1.0] * 8], 15) == [0]
