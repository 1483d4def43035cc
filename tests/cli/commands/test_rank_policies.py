import json
import os
from pathlib import Path

import pytest

from offload.routing.eviction import DEFAULT_POLICY, POLICIES
from offload.routing.trace import Synthetic
from tests.commands import coldstream, invoke


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    made = Synthetic("zipf", layers=3, num_experts=8, tokens=200).trace()
    file = tmp_path / "routing.json"
    document = {"version": 1, "moe_layers": [0, 1, 2], "num_experts": 8, "top_k": 1, "trace": made.steps}
    file.write_text(json.dumps(document))
    return file


def test_every_policy_ranks_below_the_bound(recorded: Path) -> None:
    found = json.loads(invoke("rank-policies", recorded, "--json").stdout)
    assert set(found["hit_rates"]) == {*POLICIES, "clairvoyant"}
    assert found["trace"]["tokens"] == 200 and found["slots"] == sorted(found["slots"])
    assert min(found["regret"].values()) == found["regret"][found["best"]] >= 0
    assert found["default"] == DEFAULT_POLICY and found["tokens_per_s"] == {}


def test_a_comparison_for_a_human_has_a_table_a_plot_and_a_ranking(recorded: Path) -> None:
    shown = invoke("rank-policies", recorded)
    assert shown.returncode == 0 and shown.stdout == ""
    assert "clairvoyant" in shown.stderr and "100 % │" in shown.stderr
    assert f"The default is {DEFAULT_POLICY}." in shown.stderr


def test_nothing_is_cut_at_80_columns(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = invoke("rank-policies", recorded, "--sizes", "14").stderr
    found = json.loads(invoke("rank-policies", recorded, "--sizes", "14", "--json").stdout)
    assert "…" not in shown and len(found["slots"]) > 6
    for name, rates in found["hit_rates"].items():
        shown_as = "bound" if name == "clairvoyant" else name
        rows = [line.split() for line in shown.splitlines() if line.split()[:1] == [shown_as]]
        values = [float(word) for row in rows for word in row[1:] if word != "%"]
        assert values == [round(100 * rate, 1) for rate in rates], name


def test_a_budget_marks_its_cache_size_and_predicts_speeds() -> None:
    words = ("rank-policies", "uniform", "--model", "mini-scout", "--ram", "2.2GiB", "--tokens", "16", "--json")
    found = json.loads(invoke(*words).stdout)
    place = found["slots"].index(found["slots_of_ram"])
    assert found["slot_bytes"] * found["slots_of_ram"] < 2.2 * 2**30
    speeds = found["tokens_per_s"]
    assert 0 < speeds["lru"][place] <= speeds["clairvoyant"][place]


def test_a_trace_of_another_model_is_refused(recorded: Path) -> None:
    answer = coldstream("rank-policies", recorded, "--model", "mini-scout")
    assert answer.returncode == 1 and "expected 16 of 16" in answer.stderr
    assert coldstream("rank-policies", recorded, "--ram", "2GiB").returncode == 2
    assert coldstream("rank-policies", recorded.parent / "absent.json").returncode == 1
    assert coldstream("rank-policies", recorded, "--recipe", "fast").returncode == 2


def test_comparing_policies_imports_no_torch(recorded: Path) -> None:
    blocker = recorded.parent / "torch.py"
    blocker.write_text("raise ImportError('torch was imported')")
    path = os.pathsep.join([str(recorded.parent), os.environ.get("PYTHONPATH", "")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        answer = coldstream("rank-policies", recorded, "--json")
    assert answer.returncode == 0, answer.stderr
