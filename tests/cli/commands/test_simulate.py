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


def test_nothing_is_cut_at_80_columns(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = invoke("simulate", recorded, "--sizes", "14").stderr
    found = json.loads(invoke("simulate", recorded, "--sizes", "14", "--json").stdout)
    assert "…" not in shown and len(found["slots"]) > 6
    for name, rates in found["hit_rates"].items():
        shown_as = "bound" if name == "clairvoyant" else name
        rows = [line.split() for line in shown.splitlines() if line.split()[:1] == [shown_as]]
        values = [float(word) for row in rows for word in row[1:] if word != "%"]
        assert values == [round(100 * rate, 1) for rate in rates], name


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
    assert coldstream("simulate", recorded, "--recipe", "fast").returncode == 2
    alone = coldstream("simulate", recorded, "--split", "0.5", "--vram", "8GiB")
    assert alone.returncode == 2 and "--vram and --split are of a run's timeline" in alone.stderr


def test_simulate_does_not_import_torch(recorded: Path) -> None:
    blocker = recorded.parent / "torch.py"
    blocker.write_text("raise ImportError('torch was imported')")
    path = os.pathsep.join([str(recorded.parent), os.environ.get("PYTHONPATH", "")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        answer = coldstream("simulate", recorded, "--json")
    assert answer.returncode == 0, answer.stderr


def test_a_run_is_replayed_on_a_card_that_is_not_there(tmp_path: Path) -> None:
    words = ("simulate", "zipf", "--model", "scout", "--gpu", "RTX 4090", "--tokens", "24", "--prompt", "512")
    found = json.loads(invoke(*words, "--json").stdout)
    decode = found["decode"]
    assert decode["tokens"] == 24 and decode["tokens_per_s"] > 20
    assert sum(decode["waited"].values()) * decode["tokens_per_s"] == pytest.approx(1)
    assert decode["hit_rates"]["vram"] > 0.4 and found["gpu_part"] == 0
    slower = json.loads(invoke(*words, "--vram", "12GiB", "--json").stdout)["decode"]
    assert slower["tokens_per_s"] < decode["tokens_per_s"]


def test_a_replay_for_a_human_says_what_a_token_waits_for_and_writes_a_page(tmp_path: Path) -> None:
    page = tmp_path / "run.html"
    words = ("simulate", "uniform", "--model", "maverick", "--gpu", "4090", "--tokens", "8", "--report", page)
    shown = invoke(*words)
    assert shown.returncode == 0 and shown.stdout == ""
    for text in (
        "routed experts int4-g128",
        "(recipe fast)",
        "a token waits for",
        "the disk",
        "of its rate",
        "plan's arithmetic",
        "assumed",
    ):
        assert text in shown.stderr, text
    text = page.read_text()
    assert "nothing on this page was measured" in text and text.count('class="canvas') == 3
    assert "http://" not in text and "https://" not in text


def test_a_trace_of_fewer_layers_is_stretched_and_one_of_other_experts_refused(recorded: Path) -> None:
    answer = coldstream("simulate", recorded, "--model", "scout", "--gpu", "RTX 4090")
    assert answer.returncode == 1 and "8 experts, top-1: expected 16" in answer.stderr
    assert coldstream("simulate", "uniform", "--timeline").returncode == 2
    narrow = recorded.parent / "narrow.json"
    made = Synthetic("zipf", layers=2, num_experts=16, tokens=64).trace()
    document = {"version": 1, "moe_layers": [0, 1], "num_experts": 16, "top_k": 1, "trace": made.steps}
    narrow.write_text(json.dumps(document))
    shown = invoke("simulate", narrow, "--model", "scout", "--gpu", "4090", "--tokens", "8")
    assert "has 2 MoE layers" in shown.stderr
