"""Experts in RAM: which are read before anything asks for them."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from offload.experts.cache.expert_cache import ExpertCache
from offload.records import RunOptions
from offload.routing.eviction import make_policy
from offload.routing.frequency import ExpertFrequency
from offload.routing.stats import RoutingStats
from offload.tiers import Key
from quant.checkpoint.identity import model_id
from tests import sessions
from tests.offload.tiers import Bench


def filled(bench: Bench, ram: int, counts: Mapping[Key, float] | None) -> ExpertCache:
    """A cache whose free slots have been filled by what ``counts`` say."""
    frequency = None if counts is None else ExpertFrequency(bench.layers, bench.experts, counts)
    cache = ExpertCache(bench.store, bench.reader, make_policy(None, counts), ram_slots=ram, frequency=frequency)
    cache.fill()
    cache.wait()
    return cache


def test_what_a_profile_saw_most_is_read_first_and_in_disk_order(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    order = bench.store.experts()
    counts = {key: float(index % 5) for index, key in enumerate(order)}
    begun: list[Key] = []
    by_record = {id(bench.store.record(*key)): key for key in order}
    submit = bench.reader.submit

    def spy(record: object, *more: object) -> object:
        begun.append(by_record[id(record)])
        return submit(record, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(bench.reader, "submit", spy)
    cache = filled(bench, 10, counts)
    hottest = sorted(order, key=lambda key: -counts[key])[:6]  # as often as one another: all there are
    assert cache.host.slot_of.keys() >= set(hottest) and len(cache.host.slot_of) == 10
    assert begun == sorted(begun)
    cache.fill()
    assert len(begun) == 10, "no slot was free"
    begun.clear()
    filled(bench, 10, None)
    assert begun == order[:10]


@pytest.mark.parametrize("ram", [8, 16, 24])
def test_with_a_profile_of_such_text_the_first_tokens_hit_more(bench: Bench, ram: int) -> None:
    random = np.random.default_rng(3)
    uses = 1 / np.arange(1, bench.experts + 1)
    ranks = [random.permutation(bench.experts) for _ in bench.layers]

    def text(tokens: int) -> list[list[int]]:
        return [[int(rank[random.choice(bench.experts, p=uses / uses.sum())]) for rank in ranks] for _ in range(tokens)]

    counts = dict.fromkeys(bench.store.experts(), 0.0)
    for token in text(500):
        for layer, expert in zip(bench.layers, token, strict=True):
            counts[layer, expert] += 1
    shown = text(64)
    hits: list[int] = []
    for known in (counts, None):
        cache = filled(bench, ram, known)
        for token in shown:
            for layer, expert in zip(bench.layers, token, strict=True):
                assert len(list(cache.stream(layer, [expert]))) == 1
        hits.append(cache.take_counters().by_tier["ram"])
    assert hits[0] > hits[1] + 10, f"{hits} of {64 * len(bench.layers)} requests"


def test_a_session_with_a_profile_fills_ram_before_its_first_token(bench: Bench, tmp_path: Path) -> None:
    stats = RoutingStats(model_id(bench.store.checkpoint), bench.store.shape)
    hot = [3, 6]  # of every layer
    chosen = np.array(hot)[np.random.default_rng(0).permuted(np.arange(50) % 2)]
    stats.record_step(np.broadcast_to(chosen[:, None, None], (50, len(bench.layers), 1)).copy())
    stats.save(tmp_path / "routing.json")
    found: list[set[Key]] = []
    for routing in (tmp_path / "routing.json", None):
        options = RunOptions(context=64, routing=routing)
        with sessions.session(bench.store.checkpoint.path, options, ram_slots=8) as session:
            session.experts.wait()
            found.append(set(session.experts.host.slot_of))
    assert found == [{(layer, expert) for layer in bench.layers for expert in hot}, set()]
