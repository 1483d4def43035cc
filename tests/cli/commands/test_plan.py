"""`coldstream plan`: shapes, configs and checkpoints; this machine and others; without torch."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quant.convert.convert import convert
from quant.model.known_shapes import load_shape
from quant.scheme import Scheme
from tests.commands import ROOT, Terminal, coldstream, invoke

CARD = ("--gpu", "RTX 4090")


def planned(*arguments: str | Path) -> dict[str, Any]:
    done = invoke("plan", *arguments, "--json")
    assert done.returncode == 0 and not done.stderr and done.stdout.count("\n") == 1
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("shape", ["scout", "maverick", "mini-scout"])
def test_a_shape_is_planned_for_a_machine_that_is_not_there(shape: str) -> None:
    plan = planned(shape, *CARD)
    assert plan["predicted_tokens_per_s"] > 0 and plan["predicted_prefill_tokens_per_s"] > 0
    assert plan["limited_by"] and not plan["machine"]["measured"]
    assert sum(plan["bytes"]["vram"].values()) <= plan["budgets"]["vram"] <= 24 * 2**30


def test_behemoth_is_refused_in_one_line_with_numbers() -> None:
    done = coldstream("plan", "behemoth", *CARD)
    assert done.returncode == 1 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "GiB of VRAM" in done.stderr and "shared experts" in done.stderr


def test_planning_imports_no_torch() -> None:
    program = (
        "import sys; sys.argv = ['coldstream', 'plan', 'scout', '--gpu', 'RTX 4090']\n"
        "from cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True)


def test_a_human_reads_where_bytes_go_what_limits_and_what_a_gib_buys() -> None:
    shown = invoke("plan", "maverick", *CARD)
    assert shown.stdout == ""
    for text in (
        "128 experts",
        "routed experts, cold",
        "KV cache",
        "limited by disk",
        "1 GiB     more of RAM",
        "assumed",
    ):
        assert text in shown.stderr, text


def test_a_bare_config_is_planned_like_the_shape_it_is(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(load_shape("scout")))
    by_file, by_name = planned(config, *CARD), planned("scout", *CARD)
    assert by_file["bytes"] == by_name["bytes"] and by_file["schemes"] == by_name["schemes"]


def test_a_quantized_checkpoint_is_planned_as_it_is_and_a_plain_one_too(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    convert(tiny("llama4_text"), tmp_path / "model", {"experts": Scheme("int4"), "attention": Scheme("int8")})
    assert planned(tmp_path / "model", *CARD)["schemes"]["experts"] == "int4-g128"
    assert planned(tiny("llama4_text"), *CARD)["schemes"] == {}
    assert planned(tiny("llama4_text"), *CARD, "--experts", "int8")["schemes"] == {"experts": "int8-g128"}


def test_a_recipe_gives_schemes_and_defaults_and_options_win() -> None:
    plan = planned("scout", *CARD, "--recipe", "scout-rtx4090")
    assert plan["predicted_tokens_per_s"] >= 20
    assert (plan["context"], plan["budgets"]["vram"]) == (16384, int(22.5 * 2**30))
    amended = planned(
        "scout",
        *CARD,
        "--recipe",
        "scout-rtx4090",
        "--context",
        "1000",
        "--vram",
        "20GiB",
        "--attention",
        "int4",
        "--kv",
        "int8",
    )
    assert (amended["context"], amended["budgets"]["vram"], amended["kv_bits"]) == (1000, 20 * 2**30, 8)
    assert amended["schemes"]["attention"] == "int4-g128" and amended["schemes"]["lm_head"] == "int8-g128"


def test_bandwidths_may_be_given() -> None:
    slow, fast = (planned("maverick", *CARD, "--disk-bandwidth", rate) for rate in ("1", "12"))
    assert fast["predicted_tokens_per_s"] > 3 * slow["predicted_tokens_per_s"]
    assert planned("scout", *CARD, "--ram-bandwidth", "45")["machine"]["ram_gb_s"] == 45


def test_this_machine_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plan = planned("mini-scout", "--context", "512", "--ram", "1GiB")
    assert plan["machine"]["measured"] and plan["budgets"] == {"vram": 0, "ram": 2**30}
    assert list((tmp_path / "coldstream").glob("machine-*.json"))


def test_a_context_beyond_the_models_own_is_a_note(demo_model: Path) -> None:
    notes = planned(demo_model, *CARD, "--context", "5000")["notes"]
    assert len([note for note in notes if "5,000 tokens is beyond the 1,024" in note]) == 1
    assert not planned("scout", *CARD, "--context", "5000")["notes"]


def test_a_text_too_short_to_calibrate_on_is_refused_as_quantize_does(demo_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text((demo_model / "calibration.txt").read_text()[:3_000])
    refused = [
        invoke("plan", demo_model, *CARD, "--recipe", "demo", "--calibrate", text),
        invoke("quantize", demo_model, tmp_path / "out", "--recipe", "demo", "--calibrate", text),
    ]
    assert [done.returncode for done in refused] == [1, 1]
    first, second = (done.stderr.splitlines()[-1] for done in refused)
    assert first == second and "so a text of 1,024 tokens" in first
    assert "about " in invoke("plan", "scout", *CARD, "--calibrate", text).stderr


def test_wrong_names_are_answered_with_the_right_ones() -> None:
    for arguments, expected in (
        (("skout", *CARD), "mini-scout"),
        (("nobody/nothing", *CARD), "cannot be reached"),
        (("scout", "--gpu", "RTX 409O"), "RTX 4090"),
        (("scout", *CARD, "--recipe", "best"), "quality"),
    ):
        done = coldstream("plan", *arguments)
        assert done.returncode in (1, 2) and expected in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_memory_that_calibration_takes_is_said_before_it_starts(demo_model: Path) -> None:
    text = demo_model / "calibration.txt"
    counted = planned(demo_model, *CARD, "--recipe", "demo", "--calibrate", text)["calibration"]
    assert counted["tokens_counted"] and 40_000 < counted["tokens"] < 50_000
    assert counted["bytes"]["hidden states"] == counted["tokens"] * 128 * 16
    assert counted["total_bytes"] == sum(counted["bytes"].values())
    dense = 4 * 128 * 128 + 3 * 128 * 256  # at least, of a layer: attention's and the shared expert's
    assert counted["tuning_bytes"] > 6 * 4 * dense / 2
    scout = planned("scout", *CARD, "--calibrate", text)["calibration"]
    assert not scout["tokens_counted"] and scout["bytes"]["experts of one layer"] == 16 * 3 * 5120 * 8192 * 2
    shown = invoke("plan", "scout", *CARD, "--calibrate", text)
    assert "calibrate" in shown.stderr and "experts of one layer" in " ".join(shown.stderr.split())
    assert "more with --tune" in " ".join(shown.stderr.split())


def test_sizes_rates_and_files_are_said_with_their_units() -> None:
    shown = invoke("plan", "scout", *CARD).stderr
    assert "VRAM 24.00 GiB at 1,008 GB/s, RAM 64.00 GiB at 70.0 GB/s" in shown
    assert "202.36 GiB to download (bf16), 257.66 GiB on disk while converting, 55.29 GiB after" in shown
    assert "nobody has measured this machine" in shown
    assert "dense MLPs" not in shown, "Scout has none"
    files = planned("scout", *CARD)["files"]
    assert files["converting"] == files["source"] + files["stored"]


def test_what_is_quantized_already_is_not_downloaded_again(demo_model: Path) -> None:
    assert planned(demo_model, *CARD)["files"]["source"] is None
    assert " MiB on disk" in invoke("plan", demo_model, *CARD).stderr


@pytest.mark.parametrize("command", ["plan", "simulate", "rank-policies"])
def test_nothing_is_cut_or_broken_at_60_columns(command: str) -> None:
    words = ["uniform", "--tokens", "64"] if command == "rank-policies" else ["scout", *CARD]
    terminal = Terminal(command, *words, COLUMNS="60", TERM="xterm")
    assert terminal.wait(60) == 0
    seen = re.sub(r"\x1b\[[\d;]*m", "", terminal.seen)
    assert max(len(line) for line in seen.splitlines()) <= 60, seen
    assert "…" not in terminal.seen
    terminal.close()


def test_quiet_says_only_the_result_and_verbose_says_when(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    loud, quiet = (invoke("plan", "mini-scout", "--refresh", how).stderr for how in ("--verbose", "--quiet"))
    assert re.search(r"coldstream: \[\d+\.\d s\] measuring the machine", loud)
    assert "coldstream:" not in quiet and "note:" not in quiet and "tokens/s" in quiet


def test_the_profile_of_another_model_is_refused_as_a_run_would(model: Path, demo_model: Path, tmp_path: Path) -> None:
    text, profile = tmp_path / "text.txt", tmp_path / "routing.json"
    text.write_text("import os\n" * 200)
    assert invoke("profile", model, "--text", text, "--out", profile).returncode == 0
    assert planned(model, *CARD, "--routing", profile)["routing_known"]
    found = json.loads(profile.read_text())
    profile.write_text(json.dumps({**found, "model_id": "0" * 16}))
    for refused in (
        invoke("plan", model, *CARD, "--routing", profile),
        invoke("generate", model, "Hi", "--routing", profile),
    ):
        assert refused.returncode == 1 and "statistics are of model 0000000000000000" in refused.stderr


def test_a_draft_model_has_a_row_of_its_own(demo_model: Path) -> None:
    done = invoke("plan", demo_model, "--draft-model", demo_model)
    assert done.returncode == 0, done.stderr
    assert "draft model  " in done.stdout + done.stderr
