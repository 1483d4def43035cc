import json
from pathlib import Path

import pytest

from offload.routing.trace import Synthetic
from tests.commands import coldstream, invoke


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    made = Synthetic("zipf", layers=3, num_experts=8, tokens=200).trace()
    file = tmp_path / "routing.json"
    document = {"version": 1, "moe_layers": [0, 1, 2], "num_experts": 8, "top_k": 1, "trace": made.steps}
    file.write_text(json.dumps(document))
    return file


def test_a_run_is_replayed_on_a_card_that_is_not_there(tmp_path: Path) -> None:
    words = ("simulate", "scout", "--trace", "zipf", "--gpu", "RTX 4090", "--tokens", "24", "--prompt", "512")
    found = json.loads(invoke(*words, "--json").stdout)
    decode = found["decode"]
    assert decode["tokens"] == 24 and decode["tokens_per_s"] > 20
    assert sum(decode["waited"].values()) * decode["tokens_per_s"] == pytest.approx(1)
    assert decode["hit_rates"]["vram"] > 0.4 and found["gpu_part"] == 0
    slower = json.loads(invoke(*words, "--vram", "12GiB", "--json").stdout)["decode"]
    assert slower["tokens_per_s"] < decode["tokens_per_s"]


def test_a_replay_for_a_human_says_what_a_token_waits_for_and_writes_a_page(tmp_path: Path) -> None:
    page = tmp_path / "run.html"
    words = ("simulate", "maverick", "--gpu", "4090", "--tokens", "8", "--report", page)
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
    answer = coldstream("simulate", "scout", "--trace", recorded, "--gpu", "RTX 4090")
    assert answer.returncode == 1 and "8 experts, top-1: expected 16" in answer.stderr
    narrow = recorded.parent / "narrow.json"
    made = Synthetic("zipf", layers=2, num_experts=16, tokens=64).trace()
    document = {"version": 1, "moe_layers": [0, 1], "num_experts": 16, "top_k": 1, "trace": made.steps}
    narrow.write_text(json.dumps(document))
    shown = invoke("simulate", "scout", "--trace", narrow, "--gpu", "4090", "--tokens", "8")
    assert "has 2 MoE layers" in shown.stderr
