"""Routing statistics: counted right, saved whole, merged, and refused where they do not belong."""

import json
from pathlib import Path

import numpy as np
import pytest

from offload.routing.stats import RoutingStats
from quant.errors import OutputError, ProfileError
from quant.model.shape import ModelShape

CONFIG = {
    "model_type": "mixtral",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 64,
}
SHAPE = ModelShape.from_config(CONFIG)


def _recorded(steps: list[list[list[list[int]]]], name: str = "a") -> RoutingStats:
    """``steps``: per step ``[L][T][k]``."""
    stats = RoutingStats(name, SHAPE, keep_trace=True)
    for step in steps:
        for layer, chosen in enumerate(step):
            stats.record(layer, np.array(chosen))
    return stats


def test_counts_and_reuse_are_those_of_the_tokens() -> None:
    stats = _recorded([[[[0, 1], [2, 3]], [[1, 2], [1, 2]], [[3, 0], [3, 1]]], [[[0, 3]], [[2, 0]], [[3, 0]]]])
    assert stats.tokens == 3
    assert stats.counts.tolist() == [[2, 1, 1, 2], [1, 2, 3, 0], [2, 1, 0, 3]]
    assert stats.reuse[0].tolist()[:3] == [1, 1, 0]  # expert 3 after 1 token, expert 0 after 2


def test_saved_statistics_load_equal_and_merge_by_adding(tmp_path: Path) -> None:
    stats = _recorded([[[[0, 1]], [[1, 2]], [[3, 0]]]])
    stats.save(tmp_path / "routing.json")
    loaded = RoutingStats.load(tmp_path / "routing.json", SHAPE)
    assert loaded.to_json() == stats.to_json()
    loaded.merge(stats)
    assert loaded.tokens == 2 and (loaded.counts == 2 * stats.counts).all()


def test_a_profile_with_the_transition_counts_of_earlier_versions_still_loads(tmp_path: Path) -> None:
    stats = _recorded([[[[0, 1]], [[1, 2]], [[3, 0]]]])
    older = stats.to_json() | {"transitions": [[[0, 1, 1], [0, 2, 1]], [[1, 3, 1]]]}
    (tmp_path / "routing.json").write_text(json.dumps(older))
    assert RoutingStats.load(tmp_path / "routing.json", SHAPE).to_json() == stats.to_json()


def test_statistics_of_another_model_are_refused(tmp_path: Path) -> None:
    stats = _recorded([[[[0, 1]], [[1, 2]], [[3, 0]]]])
    with pytest.raises(ProfileError, match="of model a, this model is b"):
        stats.check("b")
    stats.save(tmp_path / "routing.json")
    other = ModelShape.from_config({**CONFIG, "num_local_experts": 8})
    with pytest.raises(ProfileError, match="3 MoE layers of 4 experts: expected 3 of 8"):
        RoutingStats.load(tmp_path / "routing.json", other)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "cannot be read as JSON"),
        ("{}", "is no routing profile"),
        ("[]", "is no JSON object: expected the routing profile"),
        ("[" * 2000, "nest"),
        ('{"version": 1, "moe_layers": [0, 1, 2], "num_experts": 1e300}', "is no routing profile"),
        ('{"version": 1, "moe_layers": [0, 1, 2], "num_experts": 4}', "is a damaged routing profile"),
    ],
)
def test_a_damaged_profile_is_one_clear_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "routing.json").write_text(text)
    with pytest.raises(ProfileError, match=f"routing.json.*{said}"):
        RoutingStats.load(tmp_path / "routing.json", SHAPE)


def test_a_profile_replaces_an_earlier_one_and_no_config(tmp_path: Path) -> None:
    stats, file = _recorded([[[[0, 1]], [[1, 2]], [[3, 0]]]]), tmp_path / "routing.json"
    stats.save(file)
    stats.save(file)
    assert RoutingStats.load(file, SHAPE).tokens == stats.tokens
    for foreign in (
        {**CONFIG, "moe_layers": [0, 1], "version": 1},
        {"version": 1, "moe_layers": [0], "num_experts": 4},
    ):
        file.write_text(json.dumps(foreign))
        with pytest.raises(OutputError, match="not of this kind"):
            stats.save(file)
        assert json.loads(file.read_text()) == foreign


WRONG = [None, True, -1, 2**41, 1.5, "7", [], {}, [[1.0] * 4] * 3, [[-1] * 4] * 3, [[1] * 3] * 3, [[1] * 4] * 2]


@pytest.mark.parametrize("key", ["model_id", "top_k", "tokens", "counts", "reuse"])
@pytest.mark.parametrize("value", WRONG, ids=str)
def test_no_value_of_another_kind_is_taken_for_a_count(tmp_path: Path, key: str, value: object) -> None:
    document = _recorded([[[[0, 1]], [[1, 2]], [[3, 0]]]]).to_json()
    if (key, value) == ("model_id", "7"):
        return
    (tmp_path / "routing.json").write_text(json.dumps(document | {key: value}))
    with pytest.raises(ProfileError, match=r"routing.json is (a damaged routing profile|of a model that takes)"):
        RoutingStats.load(tmp_path / "routing.json", SHAPE)


def test_a_newer_version_is_refused_by_number(tmp_path: Path) -> None:
    (tmp_path / "routing.json").write_text('{"version": 2, "moe_layers": [0], "num_experts": 4}')
    with pytest.raises(ProfileError, match="version 2: expected 1"):
        RoutingStats.load(tmp_path / "routing.json", SHAPE)


def test_skew_of_uniform_use_is_flat_and_of_one_expert_is_all() -> None:
    uniform = _recorded([[[[e, (e + 1) % 4]] * 1 for _ in range(3)] for e in range(4)]).skew()[0]
    assert (uniform.top25, uniform.top50, uniform.entropy) == (0.25, 0.5, 2.0)
    single = _recorded([[[[1, 1]], [[1, 1]], [[1, 1]]]]).skew()[0]
    assert (single.top10, single.entropy) == (1.0, 0.0)
