import itertools
import json
import random
from pathlib import Path

import pytest

from offload.routing.eviction import POLICIES, make_policy
from offload.routing.policy_replay import CLAIRVOYANT, clairvoyant, replay, replay_policies, sizes_of
from offload.routing.trace import RULES, Synthetic, Trace, load_trace
from quant.errors import ProfileError, UsageError


def trace(*experts: int, num_experts: int = 4) -> Trace:
    """One layer, one expert per token."""
    return Trace("made", num_experts, [[[expert]] for expert in experts])


def best_possible(experts: tuple[int, ...], slots: int) -> float:
    """The most hits of any eviction choice, by trying all of them."""
    states = {frozenset(range(slots)): 0}
    for expert in experts:
        following: dict[frozenset[int], int] = {}
        for resident, hits in states.items():
            if expert in resident:
                choices, gained = [resident], hits + 1
            else:
                choices, gained = [resident - {gone} | {expert} for gone in resident], hits
            for choice in choices:
                following[choice] = max(following.get(choice, 0), gained)
        states = following
    return max(states.values()) / len(experts)


@pytest.mark.parametrize("slots", [2, 3])
def test_clairvoyant_is_the_best_of_all_possible_evictions(slots: int) -> None:
    source = random.Random(slots)
    for _ in range(20):
        experts = tuple(source.randrange(4) for _ in range(12))
        assert clairvoyant(trace(*experts), slots) == pytest.approx(best_possible(experts, slots))


@pytest.mark.parametrize(("rule", "chunk"), list(itertools.product(RULES, [1, 16])))
def test_no_policy_beats_the_clairvoyant_and_more_slots_help_it(rule: str, chunk: int) -> None:
    made = Synthetic(rule, layers=3, num_experts=8, tokens=240).trace()
    found = replay_policies(made, sizes_of(made, 4), chunk=chunk)
    bound = found.hit_rates[CLAIRVOYANT]
    assert list(bound) == sorted(bound)
    for policy in POLICIES:
        assert all(rate <= most + 1e-9 for rate, most in zip(found.hit_rates[policy], bound, strict=True))
        assert found.regret(policy) >= 0


def test_least_recent_hits_what_was_used_last() -> None:
    made = trace(0, 1, 0, 1, 2, 0)
    # Slots hold 0 and 1: four hits, then 2 evicts 0, and 0 is gone.
    assert replay(made, 2, lambda: make_policy("lru")) == pytest.approx(4 / 6)


def test_with_a_slot_for_every_expert_nothing_misses() -> None:
    made = Synthetic("zipf", layers=2, num_experts=4, tokens=50).trace()
    assert replay(made, 8, lambda: make_policy("lru")) == 1.0
    assert clairvoyant(made, 8) == 1.0


def test_under_uniform_routing_every_policy_hits_as_often_as_there_are_slots() -> None:
    made = Synthetic("uniform", layers=4, num_experts=16, tokens=1200).trace()
    found = replay_policies(made, [32])
    for policy in POLICIES:
        assert found.hit_rates[policy][0] == pytest.approx(0.5, abs=0.04)


def test_a_chunk_asks_for_each_expert_of_a_layer_once() -> None:
    made = Trace("made", 4, [[[0], [3]], [[0], [2]], [[1], [3]]])
    assert made.requests(2) == [[(0, 0)], [(1, 3), (1, 2)], [(0, 1)], [(1, 3)]]


def test_synthetic_traces_repeat_and_name_their_rules() -> None:
    assert Synthetic("drift", tokens=600).trace() == Synthetic("drift", tokens=600).trace()
    assert Synthetic("zipf", seed=1).trace() != Synthetic("zipf", seed=2).trace()
    with pytest.raises(UsageError, match="uniform, zipf"):
        Synthetic("poisson").trace()


def test_a_profile_without_a_trace_says_how_to_record_one(tmp_path: Path) -> None:
    document = {"version": 1, "moe_layers": [1, 3], "num_experts": 4, "top_k": 1, "trace": None}
    file = tmp_path / "routing.json"
    file.write_text(json.dumps(document))
    with pytest.raises(ProfileError, match="--trace"):
        load_trace(file)
    file.write_text(json.dumps(document | {"trace": [[[0], [3]], [[1], [2]]]}))
    assert load_trace(file).keys[:5] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]


@pytest.mark.parametrize(
    "steps",
    [
        [[[0], [9]], [[1], [2]]],
        [[[0], [-1]], [[1], [2]]],
        [[[0], [True]], [[1], [2]]],
        [[[0], [1.0]], [[1], [2]]],
        [[[0], [10**30]], [[1], [2]]],
        [[[0], None], [[1], [2]]],
        [[[0, 0], [1, 2]], [[1, 2], [1, 2]]],
        [[[0, 1], [1]], [[1, 2], [1, 2]]],
        [[[], []], [[], []]],
        [[], []],
        [[[0, 1, 2, 3, 0], [0, 1, 2, 3, 0]]] * 2,
        [[[0]], [[1]]],
        [[0, 1], [1, 2]],
        [[[0], [1]]],
        {"0": [[0], [1]]},
        "trace",
        7,
    ],
)
def test_a_damaged_trace_is_refused(tmp_path: Path, steps: object) -> None:
    file = tmp_path / "routing.json"
    file.write_text(json.dumps({"version": 1, "moe_layers": [1, 3], "num_experts": 4, "trace": steps}))
    with pytest.raises(ProfileError, match="damaged"):
        load_trace(file)
