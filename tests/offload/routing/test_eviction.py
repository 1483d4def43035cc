"""Policies forget what they say they forget, and never what is locked."""

import pytest

from offload.routing.eviction import POLICIES, Blended, DecayedFrequency, LeastRecent, make_policy
from quant.errors import UsageError

KEYS = [(0, e) for e in range(4)]


def test_lru_forgets_what_was_used_longest_ago() -> None:
    policy = LeastRecent()
    for expert in (0, 1, 2, 3, 0, 1):
        policy.touch((0, expert))
    assert policy.victim(KEYS, set()) == (0, 2)
    assert policy.victim(KEYS, {(0, 2)}) == (0, 3)
    assert policy.victim([*KEYS, (5, 5)], set()) == (5, 5)  # never used


def test_lfu_forgets_the_least_used_until_its_past_has_decayed() -> None:
    policy = DecayedFrequency(half_life=4)
    for _ in range(8):
        policy.touch((0, 0))
    policy.touch((0, 1))
    assert policy.victim(KEYS[:2], set()) == (0, 1)
    for _ in range(30):
        policy.touch((0, 1))
    assert policy.victim(KEYS[:2], set()) == (0, 0)


def test_lfu_survives_a_million_touches() -> None:
    policy = DecayedFrequency(half_life=8)
    for step in range(1_000_000):
        policy.touch((0, step % 3))
    assert policy.victim(KEYS[:3], set()) == (0, 1)


def test_blended_keeps_both_what_is_used_often_and_what_was_used_just_now() -> None:
    policy = Blended()
    for expert in (*[0] * 50, 1, *[2] * 8, 3):
        policy.touch((0, expert))
    assert policy.victim(KEYS, set()) == (0, 1)  # used once, a while ago; lru would forget 0
    assert policy.victim(KEYS, {(0, 1)}) != (0, 2)
    assert policy.victim([*KEYS, (0, 4)], set()) == (0, 4)  # never used


def test_blended_does_not_age_a_layer_by_the_uses_of_others() -> None:
    policy = Blended()
    policy.touch((1, 0))
    policy.touch((0, 2))
    for _ in range(1000):
        policy.touch((0, 0))
    assert policy.victim([(0, 2), (1, 0)], set()) == (0, 2)


def test_blended_starts_from_a_seed_where_there_is_one() -> None:
    policy = make_policy("blended", {(0, 0): 1, (0, 1): 9, (1, 0): 0})
    assert policy.victim(KEYS[:2], set()) == (0, 0)
    assert policy.victim([(1, 0), (0, 0)], set()) == (1, 0)


def test_a_seed_decides_until_use_says_otherwise() -> None:
    policy = make_policy("seeded", {(0, 0): 100, (0, 1): 1})
    assert policy.victim(KEYS[:2], set()) == (0, 1)
    assert policy.victim(KEYS[:3], set()) == (0, 2)
    for _ in range(10_000):
        policy.touch((0, 1))
    assert policy.victim(KEYS[:2], set()) == (0, 0)


def test_an_unknown_policy_or_a_seedless_seeded_one_is_refused() -> None:
    with pytest.raises(UsageError, match=", ".join(POLICIES)):
        make_policy("random")
    with pytest.raises(UsageError, match="--routing"):
        make_policy("seeded")
