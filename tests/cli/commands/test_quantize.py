import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import images
from tests.commands import coldstream, invoke

ROOT = Path(__file__).resolve().parents[3]


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
    answer = invoke("quantize", demo_model, tmp_path / "out", "--recipe", "demo", "--experts", "int8", "--json")
    assert json.loads(answer.stdout)["roles"]["experts"]["scheme"] == "int8-g128"


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ([], 2, "give --recipe NAME"),
        (["--experts", "int5"], 2, "--experts int5: unknown scheme 'int5'"),
        (["--experts", "int4", "--group-size", "256"], 1, "use --group-size 32 or 64 or 128"),
        (["--experts", "nf4", "--lm-head", "int8"], 1, "cannot be mixed"),
        (["--recipe", "fast", "--group-size", "32"], 2, "--group-size 32 says nothing beside a recipe"),
        (["--recipe", "nowhere"], 2, "no recipe is called 'nowhere'"),
    ],
)
def test_a_refusal_is_one_line_and_leaves_nothing(
    demo_model: Path, tmp_path: Path, options: list[str], code: int, words: str
) -> None:
    answer = coldstream("quantize", demo_model, tmp_path / "out", "--json", *options)
    assert answer.returncode == code and words in answer.stderr
    assert len(answer.stderr.splitlines()) == 1 and json.loads(answer.stdout)["error"]["exit_code"] == code
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


def test_calibrating_says_what_the_experts_saw_and_leaves_nothing_behind(demo_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    words = (demo_model / "calibration.txt").read_text()
    text.write_text(words[:12_000])
    asked = ("--experts", "int4", "--attention", "int4", "--calibrate", text)
    answer = invoke("quantize", demo_model, tmp_path / "out", *asked, "--tune", "1")
    assert answer.returncode == 0, answer.stderr
    assert "calibrated 4 layers" in answer.stderr and "the least used expert saw" in answer.stderr
    said = " ".join(answer.stderr.split())
    assert "tuning gained nothing" in said and ", tuning " in said, said  # the second is memory
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert report["rounding"].endswith("tuned in 1 passes")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.txt"]
    text.write_text(words[:3_000])
    answer = invoke("quantize", demo_model, tmp_path / "short", *asked)
    assert answer.returncode == 1 and "an expert sees" in answer.stderr


def test_tuning_what_there_is_not_is_refused(demo_model: Path, tmp_path: Path) -> None:
    asked = ("quantize", demo_model, tmp_path / "out", "--experts", "int4", "--tune", "2")
    answer = invoke(*asked)
    assert answer.returncode == 2 and "--calibrate" in answer.stderr
    answer = invoke(*asked, "--calibrate", demo_model / "calibration.txt")
    assert answer.returncode == 2 and "nothing to tune" in answer.stderr
    assert not list(tmp_path.iterdir())


def test_bits_are_chosen_shown_kept_in_the_checkpoint_and_the_same_again(demo_model: Path, tmp_path: Path) -> None:
    shown = invoke("quantize", demo_model, tmp_path / "one", "--target-bits", "4.5")
    assert shown.returncode == 0, shown.stderr
    for words in ("equal errors taken for equal harm", "attention qkv", "bits per quantized weight", "0-3"):
        assert words in " ".join(shown.stderr.split()), words  # lines are wrapped
    answer = invoke("quantize", demo_model, tmp_path / "two", "--target-bits", "4.5", "--json")
    found = json.loads(answer.stdout)["allocation"]
    report = json.loads((tmp_path / "two" / "quantization_report.json").read_text())
    assert report["allocation"] == found and 4.4 < found["bits"] <= 4.5
    assert {unit["role"] for unit in found["units"]} == {"attention", "shared_expert", "experts"}
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_a_size_is_kept_and_what_is_named_by_hand_stays(demo_model: Path, tmp_path: Path) -> None:
    asked = ("--target-size", "4.2MB", "--attention", "bf16", "--lm-head", "int8", "--json")
    found = json.loads(invoke("quantize", demo_model, tmp_path / "out", *asked).stdout)
    assert found["output_bytes"] <= 4_200_000 and "attention" not in found["roles"]
    assert found["roles"]["lm_head"]["scheme"] == "int8-g128"


def test_what_the_head_has_to_do_with_the_mean_is_said(demo_model: Path, tmp_path: Path) -> None:
    def said(name: str, *options: str) -> str:
        done = invoke("quantize", demo_model, tmp_path / name, "--target-bits", "6", *options)
        return next(line for line in done.stderr.splitlines() if line.startswith("The LM head"))

    assert "stays int8-g128; --lm-head auto" in said("judged")
    assert "stays bf16" in said("whole", "--lm-head", "bf16")
    opened = said("opened", "--lm-head", "auto")
    share = float(opened.split("%")[0].rpartition(" ")[2])
    assert "takes part" in opened and 5 < share < 50


def test_nothing_is_cut_at_80_columns(demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for name, options in (("plain", ["--recipe", "demo"]), ("mixed", ["--target-bits", "5"])):
        shown = invoke("quantize", demo_model, tmp_path / name, *options).stderr
        assert "…" not in shown
        report = json.loads((tmp_path / name / "quantization_report.json").read_text())
        for role in report["roles"].values():
            assert role["worst"]["tensor"] in shown
            assert all(scheme in shown for scheme in role["scheme"].split(", "))


def test_a_card_that_holds_everything_gets_the_most_bits(demo_model: Path, tmp_path: Path) -> None:
    asked = ("--fit", "RTX 4090", "--ram", "32GiB", "--json")
    found = json.loads(invoke("quantize", demo_model, tmp_path / "out", *asked).stdout)
    assert found["allocation"]["bits"] == 8.125
    shown = invoke("quantize", demo_model, tmp_path / "shown", *asked[:2], "--ram", "32GiB", "--context", "900")
    [line] = [line for line in shown.stderr.splitlines() if "fits a desktop with RTX 4090" in line]
    assert ": 64 experts in 2" in line and "GiB of VRAM, beside" in line and "context of 900 tokens" in line
    refused = invoke("quantize", demo_model, tmp_path / "no", *asked[:2], "--vram", "560MiB", "--ram", "1MiB")
    assert refused.returncode == 1 and "even 4.125 bits per weight" in refused.stderr


def test_routed_experts_alone_get_fewer_than_four_bits_where_that_is_allowed(demo_model: Path, tmp_path: Path) -> None:
    asked = ("--target-bits", "3.2", "--least-bits", "2", "--per-expert", "--lm-head", "bf16", "--json")
    found = json.loads(invoke("quantize", demo_model, tmp_path / "out", *asked).stdout)["allocation"]
    assert 3.1 < found["bits"] <= 3.2
    kinds = {(unit["role"] == "experts", unit["scheme"][:4]) for unit in found["units"]}
    assert (True, "int2") in kinds and (True, "int3") in kinds
    assert all(routed or kind in ("int4", "int8") for routed, kind in kinds)


def test_a_speed_that_no_bits_reach_is_refused_with_what_may_be_tried(demo_model: Path, tmp_path: Path) -> None:
    asked = ("quantize", demo_model, tmp_path / "out", "--fit", "RTX 4090", "--speed", "1e6")
    answer = invoke(*asked)
    assert answer.returncode == 1 and "do not fit 1e+06 tokens/s: use --least-bits 3 or 2" in answer.stderr
    assert "least-bits" not in invoke(*asked, "--least-bits", "2").stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--target-bits", "4.5", "--target-size", "3MB"], "are two goals: give one"),
        (["--target-bits", "4"], "are too few"),
        (["--target-bits", "40"], "expected 4.125 to 8.125"),
        (["--experts", "int4", "--routing", "r.json"], "give it with --target-bits"),
        (["--target-size", "1MB"], "the smallest that this checkpoint gets"),
        (["--experts", "int4", "--ram", "8GiB"], "say what --fit is to fit"),
        (["--experts", "int4", "--per-expert"], "--per-expert needs a goal"),
        (["--experts", "int4", "--least-bits", "2"], "--least-bits needs a goal"),
        (["--target-bits", "5", "--speed", "10"], "--speed say what --fit is to fit"),
        (["--target-bits", "3", "--least-bits", "3"], "are too few"),
        (["--experts", "int4", "--save-imatrix", "x"], "give the text with --imatrix"),
        (["--experts", "int4", "--imatrix", "a", "--calibrate", "b"], "give one of them"),
        (["--experts", "nf4", "--target-bits", "4.5"], "has no place beside int4 and int8"),
    ],
)
def test_goals_that_cannot_be_are_refused_in_one_line(
    demo_model: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    answer = invoke("quantize", demo_model, tmp_path / "out", "--json", *options)
    assert answer.returncode == 2 and words in answer.stderr
    assert len(answer.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_an_importance_matrix_is_measured_once_and_used_again(demo_model: Path, tmp_path: Path) -> None:
    text, saved = tmp_path / "text.txt", tmp_path / "im.safetensors"
    text.write_text((demo_model / "calibration.txt").read_text()[:12_000])
    measured = ("quantize", demo_model, tmp_path / "a", "--experts", "int4", "--imatrix", text, "--save-imatrix", saved)
    first = invoke(*measured)
    assert first.returncode == 0 and f"saved the importance matrix: {saved}" in " ".join(first.stderr.split())
    assert "nothing was measured, so --save-imatrix has nothing to save" in invoke(*measured, "--resume").stderr
    again = invoke("quantize", demo_model, tmp_path / "b", "--experts", "int4", "--imatrix", saved)
    assert again.returncode == 0, again.stderr
    reports = [json.loads((tmp_path / name / "quantization_report.json").read_text()) for name in "ab"]
    assert reports[1]["rounding"].startswith("imatrix ")
    one, two = (report["roles"]["experts"]["sqnr_db"] for report in reports)
    assert one == pytest.approx(two, abs=0.01)  # directions are saved in bf16


def test_a_source_that_has_no_weights_is_said_before_what_is_missing_else(tmp_path: Path) -> None:
    answer = invoke("quantize", "scout", tmp_path / "out")
    assert answer.returncode == 1 and "scout is the name of a shape, which has no weights" in answer.stderr


def test_calibrating_with_a_target_measures_what_bits_are_worth_first(demo_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text((demo_model / "calibration.txt").read_text()[:12_000])
    asked = ("--target-bits", "4.5", "--experts", "auto", "--attention", "bf16", "--calibrate", text)
    answer = invoke("quantize", demo_model, tmp_path / "out", *asked)
    assert answer.returncode == 0, answer.stderr
    assert "divergence on" in answer.stderr and "calibrated 4 layers" in answer.stderr
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert report["rounding"].startswith("gptq ") and report["allocation"]["judged_by"].startswith("divergence")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.txt"]


def test_a_destination_that_is_taken_is_refused_before_anything_is_measured(demo_model: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    done = invoke("quantize", str(demo_model), str(tmp_path / "taken"), "--target-bits", "4.5")
    assert done.returncode == 1
    assert "is not empty: choose another destination" in done.stderr
    assert "measur" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_tower_is_quantized_when_named_and_never_by_a_goal(tmp_path: Path) -> None:
    model = images.make_model(tmp_path / "model")
    refused = invoke("quantize", model, tmp_path / "out", "--target-bits", "6", "--vision", "auto")
    assert refused.returncode == 2 and "expected int8 or bf16" in refused.stderr
    asked = ("--target-bits", "6", "--group-size", "32", "--json")
    for name, options in (("kept", ()), ("named", ("--vision", "int8"))):
        found = json.loads(invoke("quantize", model, tmp_path / name, *asked, *options).stdout)
        assert ("vision" in found["roles"]) == (name == "named")
        assert "vision" not in {unit["role"] for unit in found["allocation"]["units"]}
    assert invoke("check", tmp_path / "named", "--for", "transformers").returncode == 0
    assert "it takes bf16" in invoke("check", tmp_path / "named", "--for", "vllm").stderr
