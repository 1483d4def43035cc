"""Bandwidths before and after a run: the better counts, and what speaks against both is said."""

import pytest

from offload.records import TokenRecord
from offload.run.readings import better, doubts, exceeded
from offload.run.speed import Bandwidth, DecodeSpeed
from offload.tiers import Tier

MANY = 10**9  # bytes of a token: no cache holds them


def speed(ms: float, bandwidth: Bandwidth, **read: int) -> DecodeSpeed:
    tiers: dict[Tier, int] = {tier: count for tier, count in read.items() if tier in ("vram", "ram", "disk")}  # type: ignore[misc]
    return DecodeSpeed.of([[TokenRecord("decode", 0, "", 1, ms / 1e3, bytes_read=tiers)] * 9], bandwidth)


@pytest.mark.parametrize(
    ("before", "after", "ms", "said"),
    [
        (50, 51, 25, []),  # 40 GB/s of 51
        (50, 81, 14, ["RAM gave 50 GB/s before the run and 81 after it"]),
        (81, 50, 14, ["RAM gave 81 GB/s before the run and 50 after it"]),
        (50, 50.5, 14, ["the run read RAM at 71.4 GB/s, more than the 50.5 that were measured"]),
        (50, 60, 14, ["RAM gave 50 GB/s", "the run read RAM at 71.4 GB/s, more than the 60"]),
        (50, None, 25, []),
    ],
)
def test_what_disagrees_is_said(before: float, after: float | None, ms: float, said: list[str]) -> None:
    first, second = Bandwidth(ram_gb_s=before), Bandwidth(ram_gb_s=after)
    best = better(first, second)
    assert best.ram_gb_s == max(before, after or 0)
    found = doubts(first, second, speed(ms, best, ram=MANY))
    assert len(found) == len(said)
    for text, start in zip(found, said, strict=True):
        assert text.startswith(start) and "unreliable" in text


def test_a_tier_that_was_not_read_raises_no_doubt() -> None:
    before, after = Bandwidth(ram_gb_s=50, disk_gb_s=1), Bandwidth(ram_gb_s=50, disk_gb_s=3)
    assert doubts(before, after, speed(25, before, ram=MANY)) == []
    assert len(doubts(before, after, speed(1000, before, ram=MANY, disk=MANY // 4))) == 1
    assert doubts(before, after, speed(1000, before, ram=MANY, disk=MANY // 500)) == [], "it hardly moves the floor"


def test_what_caches_may_hold_disproves_no_bandwidth_but_is_said() -> None:
    slow = Bandwidth(ram_gb_s=1)
    small = speed(0.1, slow, ram=2**20)
    assert exceeded(small, slow) == []
    [said] = doubts(slow, Bandwidth(), small)
    assert "1.00 MiB of a token were in the processor's caches" in said
    assert exceeded(speed(0.1, slow, ram=MANY), slow) == ["ram"]
