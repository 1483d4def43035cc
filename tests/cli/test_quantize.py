import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands import coldstream, invoke

ROOT = Path(__file__).resolve().parents[2]


def test_quantize_by_recipe_prints_one_json_document(demo_model: Path, tmp_path: Path) -> None:
    answer = invoke("quantize", demo_model, tmp_path / "out", "--recipe", "demo", "--json")
    assert answer.returncode == 0 and not answer.stderr
    found = json.loads(answer.stdout)
    assert found["output_bytes"] < found["source_bytes"] / 2
    assert 4 < found["bits_per_weight"] < 7 and found["mb_per_s"] > 0 and found["seconds"] > 0
    assert found["roles"]["experts"]["scheme"] == "int4-g128" and found["roles"]["experts"]["sqnr_db"] > 15
    assert (tmp_path / "out" / "config.json").exists()


def test_quantize_by_hand_says_what_each_role_lost(demo_model: Path, tmp_path: Path) -> None:
    roles = ["--experts", "int4", "--attention", "int8", "--group-size", "64"]
    answer = invoke("quantize", demo_model, tmp_path / "out", *roles)
    assert answer.returncode == 0 and answer.stdout == ""
    assert "int4-g64" in answer.stderr and "int8-g64" in answer.stderr and "dB" in answer.stderr


def test_what_is_named_by_hand_wins_over_the_recipe(demo_model: Path, tmp_path: Path) -> None:
    answer = invoke(
        "quantize", demo_model, tmp_path / "out", "--recipe", "demo", "--experts", "int8", "--json"
    )
    assert json.loads(answer.stdout)["roles"]["experts"]["scheme"] == "int8-g128"


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ([], 2, "give --recipe NAME"),
        (["--experts", "int3"], 1, "unknown scheme 'int3'"),
        (["--experts", "int4", "--group-size", "256"], 1, "use --group-size 32 or 64 or 128"),
        (["--experts", "nf4", "--lm-head", "int8"], 1, "cannot be mixed"),
        (["--recipe", "nowhere"], 1, "no recipe is called 'nowhere'"),
    ],
)
def test_a_refusal_is_one_line_and_leaves_nothing(
    demo_model: Path, tmp_path: Path, options: list[str], code: int, words: str
) -> None:
    answer = coldstream("quantize", demo_model, tmp_path / "out", "--json", *options)
    assert answer.returncode == code and words in answer.stderr
    assert len(answer.stderr.splitlines()) == 1 and answer.stdout == ""
    assert not list(tmp_path.iterdir())


def test_a_source_that_is_nowhere_is_one_line(tmp_path: Path) -> None:
    for source, words in (("no/such", "Hub cannot be reached"), ("./nowhere/at/all", "no such directory")):
        answer = coldstream("quantize", source, tmp_path / "out", "--experts", "int4", "--json")
        assert answer.returncode == 1 and words in answer.stderr and len(answer.stderr.splitlines()) == 1


def test_ctrl_c_stops_at_once_and_resume_ends_the_same(demo_model: Path, tmp_path: Path) -> None:
    assert invoke("quantize", demo_model, tmp_path / "one", "--experts", "int4", "--json").returncode == 0
    command = [
        sys.executable,
        "-m",
        "cli.main",
        "quantize",
        str(demo_model),
        str(tmp_path / "two"),
        "--experts",
        "int4",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "two.partial").exists() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    if process.returncode != 0:  # on a quick machine it may have finished
        assert process.returncode == 130 and errors.splitlines()[-1] == "coldstream: interrupted"
        assert not (tmp_path / "two").exists()
    assert invoke("quantize", demo_model, tmp_path / "two", "--experts", "int4", "--resume").returncode == 0
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_plain_rounding_can_be_asked_for(demo_model: Path, tmp_path: Path) -> None:
    decibels = {}
    for rounding in ("rtn", "search"):
        asked = ("--experts", "int4", "--rounding", rounding, "--json")
        answer = invoke("quantize", demo_model, tmp_path / rounding, *asked)
        decibels[rounding] = json.loads(answer.stdout)["roles"]["experts"]["sqnr_db"]
    assert decibels["search"] > decibels["rtn"] + 0.5


def test_calibrating_says_what_the_experts_saw_and_leaves_nothing_behind(
    demo_model: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    words = (demo_model / "calibration.txt").read_text()
    text.write_text(words[:12_000])
    asked = ("--experts", "int4", "--calibrate", text)
    answer = invoke("quantize", demo_model, tmp_path / "out", *asked)
    assert answer.returncode == 0, answer.stderr
    assert "calibrated layer 4 of 4" in answer.stderr and "the least used expert saw" in answer.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.txt"]
    text.write_text(words[:3_000])
    answer = invoke("quantize", demo_model, tmp_path / "short", *asked)
    assert answer.returncode == 2 and "an expert sees" in answer.stderr
