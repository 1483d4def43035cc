import json
import os
from pathlib import Path

import pytest

from offload.policy import DEFAULT_POLICY, POLICIES
from offload.trace import Synthetic
from tests.commands import coldstream, invoke


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    made = Synthetic("zipf", layers=3, num_experts=8, tokens=200).trace()
    file = tmp_path / "routing.json"
    document = {"version": 1, "moe_layers": [0, 1, 2], "num_experts": 8, "top_k": 1, "trace": made.steps}
    file.write_text(json.dumps(document))
    return file


def test_simulate_ranks_every_policy_below_the_bound(recorded: Path) -> None:
    found = json.loads(invoke("simulate", recorded, "--json").stdout)
    assert set(found["hit_rates"]) == {*POLICIES, "clairvoyant"}
    assert found["trace"]["tokens"] == 200 and found["slots"] == sorted(found["slots"])
    assert min(found["regret"].values()) == found["regret"][found["best"]] >= 0
    assert found["default"] == DEFAULT_POLICY and found["tokens_per_s"] == {}


def test_simulate_for_a_human_has_a_table_a_plot_and_a_ranking(recorded: Path) -> None:
    shown = invoke("simulate", recorded)
    assert shown.returncode == 0 and shown.stdout == ""
    assert "clairvoyant" in shown.stderr and "100 % │" in shown.stderr
    assert f"The default is {DEFAULT_POLICY}." in shown.stderr


def test_a_budget_marks_its_cache_size_and_predicts_speeds() -> None:
    words = ("simulate", "uniform", "--model", "mini-scout", "--ram", "2.2GiB", "--tokens", "16", "--json")
    found = json.loads(invoke(*words).stdout)
    place = found["slots"].index(found["slots_of_ram"])
    assert found["slot_bytes"] * found["slots_of_ram"] < 2.2 * 2**30
    speeds = found["tokens_per_s"]
    assert 0 < speeds["lru"][place] <= speeds["clairvoyant"][place]


def test_a_trace_of_another_model_is_refused(recorded: Path) -> None:
    answer = coldstream("simulate", recorded, "--model", "mini-scout")
    assert answer.returncode == 1 and "expected 16 of 16" in answer.stderr
    assert coldstream("simulate", recorded, "--ram", "2GiB").returncode == 2
    assert coldstream("simulate", recorded.parent / "absent.json").returncode == 1


def test_simulate_does_not_import_torch(recorded: Path) -> None:
    blocker = recorded.parent / "torch.py"
    blocker.write_text("raise ImportError('torch was imported')")
    path = os.pathsep.join([str(recorded.parent), os.environ.get("PYTHONPATH", "")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        answer = coldstream("simulate", recorded, "--json")
    assert answer.returncode == 0, answer.stderr
