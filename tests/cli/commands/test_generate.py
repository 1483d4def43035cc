"""Generating from the command line."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from cli.terminal.interrupt import INTERRUPTED
from tests.commands import COLDSTREAM, ROOT, invoke

PROMPT = "import os\n\ndef join("


def test_text_goes_to_stdout_alone_and_the_report_to_stderr(model: Path) -> None:
    done = invoke("generate", model, PROMPT, "-n", "20")
    assert done.returncode == 0, done.stderr
    assert "tokens/s" not in done.stdout
    for word in ("prefill", "decode", "floor", "experts", "RAM", "files", "resident", "kernel"):
        assert f"  {word} " in done.stderr, word


def test_greedy_text_is_the_same_with_json_from_stdin_and_streamed(model: Path) -> None:
    streamed = invoke("generate", model, PROMPT, "-n", "20")
    piped = invoke("generate", model, "-", "-n", "20", "--json", stdin=PROMPT)
    document = json.loads(piped.stdout)
    assert piped.stderr == ""
    assert document["text"] + "\n" == streamed.stdout
    assert document["finish_reason"] == "length"
    assert document["decode"]["tokens"] == 18, "20, less the one of the prefill and the warm-up step"


def test_a_seed_repeats_a_sampled_text(model: Path) -> None:
    texts = {
        invoke("generate", model, PROMPT, "-n", "12", "--temperature", "1", "--seed", "3").stdout for _ in range(2)
    }
    assert len(texts) == 1


def test_a_stop_string_ends_the_text_before_it(model: Path) -> None:
    whole = json.loads(invoke("generate", model, PROMPT, "-n", "20", "--json").stdout)["text"]
    stop = whole[5:8]
    document = json.loads(invoke("generate", model, PROMPT, "-n", "20", "--json", "--stop", stop).stdout)
    assert document["text"] == whole[: whole.index(stop)]
    assert document["finish_reason"] == "stop"


def test_a_full_context_is_said_once_and_what_to_do(model: Path) -> None:
    asked = ("generate", model, PROMPT, "-n", "50", "--context", "32")
    shown = invoke(*asked)
    [line] = [line for line in shown.stderr.splitlines() if "was cut off because the context of 32" in line]
    assert "--context" in line and "made for up to 1,024" in line
    document = json.loads(invoke(*asked, "--json").stdout)
    assert document["finish_reason"] == "context"
    assert document["prompt_tokens"] + len(document["timeline"]["ms"]) == 32
    enough = json.loads(invoke(*asked[:4], "8", *asked[5:], "--json").stdout)
    assert enough["finish_reason"] == "length" and not any("cut off" in note for note in enough["notes"])


def test_a_context_beyond_the_models_own_is_a_note_and_the_default_is_never_beyond(model: Path) -> None:
    asked = ("generate", model, PROMPT, "-n", "2", "--json")
    beyond = json.loads(invoke(*asked, "--context", "2000").stdout)
    [note] = [note for note in beyond["notes"] if "max_position_embeddings" in note]
    assert "2,000" in note and "1,024" in note
    default = json.loads(invoke(*asked).stdout)
    assert default["context"] == 1024 and not any("max_position" in note for note in default["notes"])


def test_the_chat_template_changes_the_prompt(model: Path) -> None:
    plain, chat = (
        json.loads(invoke("generate", model, "Hi", "-n", "2", "--json", *extra).stdout)["prompt_tokens"]
        for extra in ([], ["--chat"])
    )
    assert chat > plain


def test_the_report_page_is_written_and_a_missing_folder_refused_before_the_run(model: Path, tmp_path: Path) -> None:
    page = tmp_path / "run.html"
    assert invoke("generate", model, PROMPT, "-n", "4", "--report", page).returncode == 0
    assert "Decode runs at" in page.read_text()
    refused = invoke("generate", model, PROMPT, "--report", tmp_path / "no" / "run.html")
    assert refused.returncode == 1
    assert refused.stdout == ""


def test_an_unreadable_sampling_setting_is_one_line(model: Path) -> None:
    done = invoke("generate", model, PROMPT, "--repetition-penalty", "0")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("coldstream: error: ")


@pytest.mark.parametrize("when", ["while importing", "while loading", "while generating"])
def test_ctrl_c_ends_a_run_at_once_with_130(model: Path, when: str) -> None:
    process = subprocess.Popen(
        [*COLDSTREAM, "generate", str(model), PROMPT, "-n", "3000", "--ignore-eos"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    if when == "while importing":
        time.sleep(0.5)
    elif when == "while loading":
        process.stderr.readline()
    else:
        process.stdout.read(1)
    started = time.perf_counter()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == INTERRUPTED
    assert time.perf_counter() - started < 2
    assert "Traceback" not in err
