"""A model without experts: no command and no page speaks of any."""

import json
import re
from pathlib import Path

import pytest

from cli.html.svg_plots import Bins
from tests.commands import coldstream, invoke

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
NOTHING = re.compile(
    r"experts? [^ ]*hits|[Ee]xpert requests|found theirs|\b0 of 0\b|\b0 experts|of a miss|routing of a"
)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG))
    assert coldstream("synth", config, tmp_path / "dense").returncode == 0
    return tmp_path / "dense"


def test_neither_plan_nor_run_nor_page_speaks_of_experts(dense: Path, tmp_path: Path) -> None:
    page, replayed = tmp_path / "run.html", tmp_path / "simulated.html"
    said = [
        invoke("plan", dense),
        invoke("plan", dense, "--gpu", "RTX 3060"),
        invoke("generate", dense, "x", "-n", "3", "--report", page),
        invoke("simulate", dense, "--gpu", "RTX 3060", "--report", replayed),
    ]
    assert [done.returncode for done in said] == [0] * len(said), [done.stderr for done in said]
    shown = [done.stdout + done.stderr for done in said] + [file.read_text() for file in (page, replayed)]
    assert not [
        found[0] for text in shown for found in NOTHING.finditer(re.sub(r"<script.*?</script>", "", text, flags=re.S))
    ]
    assert "(1 token in " in said[2].stderr, "and one token is no tokens"


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 10, 60, 1000])
def test_no_step_is_named_twice_below_a_plot(count: int) -> None:
    named = [label for _, label in Bins(count).ticks()]
    assert len(set(named)) == len(named) and named[0] == "1" and named[-1] == f"{count:,}"
    for place, label in Bins(count).ticks()[1:]:
        assert place == pytest.approx(int(label.replace(",", "")) / count)
