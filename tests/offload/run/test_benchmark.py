"""The benchmark and the account of it, on a real tiny model with experts on disk."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from offload.hardware.ledger import forget_peak, peak_resident_bytes, resident_bytes
from offload.records import RunOptions, Sampling
from offload.run.benchmark import Benchmark
from offload.run.collect import account, disk_bytes_by_role, expert_map_of
from offload.run.report import ExpertRequests
from offload.run.sequence_bench import SequenceBenchmark
from offload.run.sequence_speed import sequence_speeds
from offload.run.session import Session
from offload.run.speed import Bandwidth
from quant.convert.convert import convert
from quant.errors import InputError
from quant.scheme import Scheme
from tests import sessions

TEXT = "The quick brown fox jumps over the lazy dog. " * 20
SLOTS = 12  # of 4 layers × 8 experts


@pytest.fixture(scope="module")
def session(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    path = tmp_path_factory.mktemp("benchmark") / "model"
    convert(tiny("llama4_text"), path, {"experts": Scheme("int4")})
    options = RunOptions(context=256, page_cache=True, sequences=4)
    with sessions.session(path, options, ram_slots=SLOTS, prompt_chunk=32) as opened:
        yield opened


def test_every_repetition_is_a_whole_prompt_and_all_the_tokens(session: Session) -> None:
    said: list[str] = []
    runs = Benchmark(prompt_tokens=40, tokens=5, repeat=3).run(session, TEXT, said.append)
    assert [[r.phase for r in run] for run in runs] == [["prefill", *["decode"] * 5]] * 3
    assert [run[0].tokens_in for run in runs] == [40] * 3, "nothing was left in the KV cache by the one before"
    assert said == ["warm-up", "run 1 of 3", "run 2 of 3", "run 3 of 3"]


def test_a_text_shorter_than_the_prompts_is_repeated(session: Session) -> None:
    [run] = Benchmark(prompt_tokens=100, tokens=1, repeat=1).run(session, "short")
    assert run[0].tokens_in == 100


def test_prompts_come_after_random_keys_and_values_and_nobody_finds_these_afterwards(session: Session) -> None:
    plain = Benchmark(prompt_tokens=20, tokens=3, repeat=1).run(session, TEXT)[0]
    filled = Benchmark(prompt_tokens=20, tokens=3, repeat=2, filled=150)
    assert filled.context == 150 + 20 + 3 + 1
    for run in filled.run(session, TEXT):
        assert run[0].tokens_in == 20 and run[0].reused.memory == 150
        assert run[1].bytes_read["ram"] > plain[1].bytes_read["ram"]
    assert session.cached_tokens == 0
    assert session.kv_pool.counts.free == session.kv_pool.counts.count


def test_sequences_are_measured_where_as_many_share_a_step(session: Session) -> None:
    bench = SequenceBenchmark(Benchmark(prompt_tokens=20, tokens=12, repeat=1), (1, 3))
    assert bench.context * bench.sequences >= 3 * (20 + 12 + 1), "the KV cache holds all of them"
    began = time.perf_counter()
    together = bench.run(session, TEXT, lambda line: None)
    took = time.perf_counter() - began
    assert together is not None and together.dot_rate, "what the cores can do is measured beside it"
    assert not together.ram_gb_s, "experts that are not all in RAM are not read for it"
    runs = together.runs
    assert {record.sequences for run in runs for record in run} == {1, 3}
    assert sum(record.own_seconds for run in runs for record in run) < took, "time is told once"
    one, three = sequence_speeds(together, Bandwidth(ram_gb_s=20, disk_gb_s=1))
    assert (one.n, three.n) == (1, 3) and three.steps >= 6
    assert one.experts_per_step <= three.experts_per_step < 3 * one.experts_per_step, "shared experts count once"
    assert three.per_sequence_tokens_per_s < three.tokens_per_s


def test_a_prompt_that_arrives_is_timed_with_what_others_wait(session: Session) -> None:
    bench = SequenceBenchmark(Benchmark(prompt_tokens=16, tokens=4, repeat=1), arriving=120)
    found = bench.arrive(session, TEXT, lambda line: None)
    assert found is not None and found.sequences == 3 and found.prompt_chunk == 32
    assert 0 < found.chunk_ms <= 1e3 * found.first_token_s, "four chunks, and what others got between them"
    assert found.longest_gap_ms >= found.step_ms > 0
    assert SequenceBenchmark(Benchmark()).arrive(session, TEXT, lambda line: None) is None


def test_an_empty_text_is_refused(session: Session) -> None:
    with pytest.raises(InputError, match="empty"):
        Benchmark().run(session, " \n")


def test_the_account_agrees_with_the_session(session: Session) -> None:
    session.reset()
    records = list(session.generate(session.encode(TEXT)[:50], Sampling(max_tokens=9)))
    report = account(session, [records], command="generate", bandwidth=Bandwidth(ram_gb_s=20, disk_gb_s=1))
    assert report.prefill.tokens == 50
    assert report.decode.tokens == len(records) - 1
    assert report.experts.hits + report.experts.misses == sum(r.hits + r.misses for r in records)
    assert report.experts.misses > 0, "most experts do not fit the slots"
    resident = sum(row.count("ram") for row in report.expert_map.tiers)
    assert 0 < resident <= SLOTS
    assert sum(map(sum, report.expert_map.counts)) == int(session.routing.counts.sum())
    assert sum(report.memory.ram.values()) + report.memory.unaccounted_bytes == report.memory.rss_bytes
    assert report.memory.peak_rss_bytes >= report.memory.rss_bytes
    assert report.decode.bytes_per_token["disk"] > 0
    assert report.environment.cpu
    assert report.environment.kernel == session.kernel


def test_bandwidths_read_again_after_the_run_count_if_they_are_better(session: Session) -> None:
    session.reset()
    records = list(session.generate(session.encode(TEXT)[:50], Sampling(max_tokens=9)))
    low = Bandwidth(ram_gb_s=0.01, disk_gb_s=0.001)
    report = account(session, [records], command="bench", bandwidth=low, again=True)
    assert report.bandwidth.ram_gb_s and report.bandwidth.ram_gb_s > 0.5
    assert report.bandwidth.disk_gb_s and report.bandwidth.disk_gb_s > 0.001
    said = {doubt.split(" gave ")[0] for doubt in report.doubts}
    assert said and said <= {"RAM", "the disk"}, "whichever decides the floor"
    assert report.to_json()["doubts"] == list(report.doubts)


def test_requests_of_all_layers_add_up_to_those_of_the_steps(session: Session) -> None:
    session.reset()
    before = expert_map_of(session).requests
    records = list(session.generate(session.encode(TEXT)[:50], Sampling(max_tokens=9)))
    after = expert_map_of(session).requests
    assert len(after) == len(session.shape.moe_layers)
    for tier, count in ExpertRequests.of(records).by_tier.items():
        assert sum(row[tier] for row in after) - sum(row[tier] for row in before) == count, tier
    assert all(sum(now.values()) > sum(then.values()) for now, then in zip(after, before, strict=True))


def test_bytes_on_disk_by_role_are_the_whole_checkpoint(session: Session) -> None:
    checkpoint = session.checkpoint
    assert sum(disk_bytes_by_role(checkpoint).values()) == sum(e.nbytes for e in checkpoint.entries.values())


def test_the_peak_can_be_made_to_count_from_now() -> None:
    block = bytearray(200 * 2**20)
    high = peak_resident_bytes()
    del block
    if not forget_peak():
        pytest.skip("/proc/self/clear_refs cannot be written here")
    assert resident_bytes() <= peak_resident_bytes() < high
