import json
from pathlib import Path

import pytest

from tests.commands import coldstream, invoke

SMALL = [
    "--hidden",
    "256",
    "--layers",
    "2",
    "--experts-per-layer",
    "4",
    "--intermediate",
    "256",
    "--heads",
    "4",
    "--kv-heads",
    "2",
    "--head-dim",
    "64",
    "--vocab",
    "512",
]


def test_synth_by_numbers_writes_a_model_and_says_how_fast(tmp_path: Path) -> None:
    answer = invoke("synth", tmp_path / "out", *SMALL, "--experts", "int8", "--zipf", "1", "--json")
    assert answer.returncode == 0 and not answer.stderr
    found = json.loads(answer.stdout)
    assert found["mb_per_s"] > 0 and found["output_bytes"] > 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["hidden_size"], config["num_local_experts"], config["vocab_size"]) == (256, 4, 512)
    [group] = config["quantization_config"]["config_groups"].values()
    assert group["weights"]["num_bits"] == 8


def test_without_schemes_everything_is_int4_and_the_head_int8(tmp_path: Path) -> None:
    assert invoke("synth", tmp_path / "out", *SMALL, "--json").returncode == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    bits = {tuple(group["targets"]): group["weights"]["num_bits"] for group in config["config_groups"].values()}
    assert sorted(bits.values()) == [4, 8]


def test_a_config_json_is_a_shape_too(demo_model: Path, tmp_path: Path) -> None:
    answer = invoke("synth", demo_model / "config.json", tmp_path / "out", "--experts", "int4", "--json")
    assert answer.returncode == 0 and (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--hidden", "100"], "--hidden 100: expected a multiple of 128, the group size: 128 "),
        (["--intermediate", "300"], "256 or 384"),
        (["--kv-heads", "3"], "--kv-heads 3"),
        (["--head-dim", "96", "--heads", "6"], "--heads times --head-dim 576"),
        (["--top-k", "5"], "at most 4 experts per token"),
        (["--layers", "0"], "--layers"),
        (["--dense-every", "0"], "--dense-every"),
    ],
)
def test_numbers_that_make_no_model_are_wrong_usage(tmp_path: Path, options: list[str], words: str) -> None:
    answer = invoke("synth", tmp_path / "out", *SMALL, *options)
    assert answer.returncode == 2 and words in answer.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["synth"], 2, "needs a destination"),
        (["synth", "scout"], 2, "coldstream synth scout DST"),
        (["synth", "mini-scout", "OUT", "--hidden", "256", "--top-k", "2"], 2, "--hidden and --top-k make a"),
        (["synth", "nowhere", "OUT"], 1, "or a shape"),
        (["synth", "behemoth", "OUT", "--experts", "int4"], 1, "free, but the output needs"),
    ],
)
def test_a_refusal_is_one_line_and_leaves_nothing(tmp_path: Path, arguments: list[str], code: int, words: str) -> None:
    answer = coldstream(*[str(tmp_path / "out") if word == "OUT" else word for word in arguments], "--json")
    assert answer.returncode == code and words in answer.stderr and len(answer.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
