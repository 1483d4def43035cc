"""Speeds and the floor, from records with known times."""

import pytest

from offload.records import TokenRecord
from offload.run.sequence_speed import Arithmetic, Together, sequence_speeds
from offload.run.speed import Bandwidth, DecodeSpeed, PrefillSpeed, floor_of, percentile
from offload.tiers import Tier


def prefill(tokens: int, seconds: float) -> TokenRecord:
    return TokenRecord("prefill", 0, "", tokens, seconds)


def decode(seconds: float, **read: int) -> TokenRecord:
    tiers: dict[Tier, int] = {tier: read[tier] for tier in ("vram", "ram", "disk") if tier in read}  # type: ignore[misc]
    return TokenRecord("decode", 0, "", 1, seconds, bytes_read=tiers)


def test_prefill_and_decode_are_never_mixed() -> None:
    run = [prefill(100, 2.0), decode(0.1), decode(0.1)]
    assert PrefillSpeed.of([run]).tokens_per_s == 50
    assert DecodeSpeed.of([run], Bandwidth()).tokens_per_s == pytest.approx(10)


def test_turns_of_a_chat_count_by_their_tokens_and_repetitions_by_their_median() -> None:
    runs = [[prefill(100, 1.0)], [prefill(100, 2.0)], [prefill(100, 10.0)]]
    assert PrefillSpeed.of(runs).tokens_per_s == pytest.approx(300 / 13)
    assert PrefillSpeed.of(runs, median=True).tokens_per_s == 50
    assert PrefillSpeed.of(runs, median=True).spread == (10, 100)


def test_warm_up_steps_are_left_out_of_decode() -> None:
    run = [prefill(1, 1.0), decode(5.0), decode(0.1), decode(0.1)]
    speed = DecodeSpeed.of([run], Bandwidth(), warmup=1)
    assert speed.tokens == 2
    assert speed.ms_per_token_max == pytest.approx(100)


def test_a_run_no_longer_than_its_warm_up_is_reported_whole() -> None:
    assert DecodeSpeed.of([[decode(0.5)]], Bandwidth(), warmup=1).tokens == 1


def test_the_floor_in_memory_is_the_sum_of_ram_and_vram() -> None:
    run = [decode(0.004, ram=20_000_000, vram=300_000_000)] * 4
    speed = DecodeSpeed.of([run], Bandwidth(ram_gb_s=20, vram_gb_s=300))
    assert speed.floor_ms_by_tier == pytest.approx({"ram": 1.0, "vram": 1.0})
    assert speed.floor_ms_per_token == pytest.approx(2.0)
    assert speed.fraction_of_floor == pytest.approx(0.5)


def test_the_disk_is_read_beside_memory_so_the_longer_of_both_is_the_floor() -> None:
    run = [decode(0.020, ram=20_000_000, disk=10_000_000)] * 4
    speed = DecodeSpeed.of([run], Bandwidth(ram_gb_s=20, disk_gb_s=1))
    assert speed.floor_ms_per_token == pytest.approx(10)
    assert speed.floor_limited_by == "disk"
    assert floor_of({"ram": 11.0, "disk": 10.0}) == (11.0, "ram")


def test_without_bandwidths_there_is_no_floor_and_no_invented_fraction() -> None:
    speed = DecodeSpeed.of([[decode(0.1, ram=1000)]], Bandwidth())
    assert speed.floor_ms_per_token is None
    assert speed.fraction_of_floor is None
    assert speed.floor_limited_by is None


def test_achieved_bandwidth_is_bytes_over_the_time_of_decoding() -> None:
    run = [prefill(10, 9.0), decode(0.1, ram=10**9), decode(0.3, ram=10**9)]
    assert DecodeSpeed.of([run], Bandwidth()).achieved() == pytest.approx({"ram": 5.0})


def test_nothing_decoded_gives_no_speed_instead_of_an_error() -> None:
    speed = DecodeSpeed.of([[prefill(3, 1.0)]], Bandwidth(ram_gb_s=20))
    assert (speed.tokens, speed.tokens_per_s, speed.ms_per_token_p50, speed.achieved()) == (0, None, None, {})


def test_percentiles_interpolate() -> None:
    assert percentile([1.0, 2.0], 0.5) == 1.5
    assert percentile([1.0, 2.0, 3.0], 0.9) == pytest.approx(2.8)
    assert percentile([], 0.5) is None


def shared(sequences: int, waited: float, own: float, ram: int = 0) -> TokenRecord:
    tiers: dict[Tier, int] = {"ram": ram}
    return TokenRecord("decode", 0, "", 1, waited, {"ram": 10}, tiers, sequences=sequences, own_seconds=own)


def test_sequences_that_share_a_step_divide_its_time_and_its_bytes() -> None:
    # Two sequences, ten steps of 20 ms that read 100 MB each, and a prompt of a third in between.
    runs = [[shared(2, 0.020, 0.010, 50_000_000)] * 9 + [shared(2, 1.020, 0.010, 50_000_000)] for _ in range(2)]
    speed = DecodeSpeed.of(runs, Bandwidth(ram_gb_s=10))
    assert speed.tokens_per_s == pytest.approx(100), "20 tokens in 0.2 s of steps, whoever waited how long"
    assert speed.ms_per_token_p50 == pytest.approx(10)
    assert speed.floor_ms_per_token == pytest.approx(5)
    assert speed.fraction_of_floor == pytest.approx(0.5)


def test_each_number_of_sequences_has_a_floor_of_its_own() -> None:
    alone = [shared(1, 0.010, 0.010, 80_000_000)] * 4
    pair = [[shared(2, 0.015, 0.0075, 60_000_000)] * 6, [shared(2, 0.015, 0.0075, 60_000_000)] * 6]
    one, two = sequence_speeds(Together([alone, *pair]), Bandwidth(ram_gb_s=10))
    assert (one.n, one.steps, two.n, two.steps) == (1, 4, 2, 6)
    assert two.tokens_per_s == pytest.approx(2 / 0.015) and two.per_sequence_tokens_per_s == pytest.approx(1 / 0.015)
    assert two.bytes_per_step == {"ram": 120_000_000} and two.experts_per_step == 20
    assert one.fraction_of_floor == pytest.approx(0.8) and two.fraction_of_floor == pytest.approx(0.8)
    assert two.floor_limited_by == "ram bandwidth"


def test_products_are_the_floor_of_weights_that_they_take_longer_for_than_reading() -> None:
    # 40 MB in all at 10 GB/s: 1 ms for 10 MB that all rows multiply, 3 for experts; 4 rows times 10 and 5 million
    # weights at 10^10 products a second: 4 ms and 2.
    steps = Together([[shared(4, 0.04, 0.005, 10_000_000)] * 4])
    arithmetic = Arithmetic(dot_rate=10, dense=((10_000_000, 10_000_000),), routed=5_000_000)
    [found] = sequence_speeds(steps, Bandwidth(ram_gb_s=10), arithmetic)
    assert (found.floor_ms_per_step, found.floor_limited_by) == (pytest.approx(7), "compute")
    assert (found.read_ms_per_step, found.products_ms_per_step) == (pytest.approx(4), pytest.approx(6))
    assert found.fraction_of_floor == pytest.approx(0.35)


def test_a_floor_is_told_by_memory_as_it_was_beside_those_runs() -> None:
    alone, pair = [shared(1, 0.01, 0.01, 80_000_000)] * 4, [shared(2, 0.015, 0.0075, 60_000_000)] * 6
    one, two = sequence_speeds(Together([alone, pair, pair], {2: 20.0}), Bandwidth(ram_gb_s=10))
    assert (one.ram_gb_s, two.ram_gb_s) == (10, 20)
    assert one.fraction_of_floor == pytest.approx(0.8) and two.fraction_of_floor == pytest.approx(0.4)
    assert two.products_ms_per_step is None, "nobody measured them"
