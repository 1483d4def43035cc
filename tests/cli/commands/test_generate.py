"""Generating from the command line."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from cli.terminal.console import Console
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


def test_drafts_change_no_text_and_the_report_says_what_came_of_them(model: Path) -> None:
    prompt = "def read(path):\n    return path\n\n" * 4
    plain = invoke("generate", model, prompt, "-n", "60", "--json", "--ignore-eos")
    drafted = invoke("generate", model, prompt, "-n", "60", "--json", "--ignore-eos", "--draft", "ngram")
    document = json.loads(drafted.stdout)
    assert document["text"] == json.loads(plain.stdout)["text"]
    assert json.loads(plain.stdout)["draft"] is None
    draft = document["draft"]
    assert draft["kind"] == "ngram" and draft["drafted"] >= draft["accepted"] > 0
    assert draft["acceptance"] == pytest.approx(draft["accepted"] / draft["drafted"])
    assert draft["tokens_per_step"] > 1
    assert "tokens drafted were right" in invoke("generate", model, prompt, "-n", "60", "--draft", "ngram").stderr
    assert invoke("generate", model, prompt, "--draft", "tea leaves").returncode == 2


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
    assert ("  prefill " in err) == (when == "while generating"), "what there is is reported"


def test_ctrl_c_keeps_the_text_the_document_and_the_page(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, write, page = [], Console.write, tmp_path / "run.html"

    def interrupted(console: Console, text: str) -> None:
        written.append(text)
        write(console, text)
        if len(written) == 7:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Console, "write", interrupted)
    asked = ("generate", model, PROMPT, "-n", "500", "--ignore-eos", "--report", page, "--json")
    done = invoke(*asked)
    assert done.returncode == INTERRUPTED
    document = json.loads(done.stdout)
    assert document["text"] == "".join(written[:7])
    assert document["finish_reason"] is None
    assert document["decode"]["tokens_per_s"] > 0
    assert "Decode runs at" in page.read_text()
    assert signal.getsignal(signal.SIGINT) != signal.SIG_DFL


def test_a_prompt_that_is_no_utf8_is_one_line(model: Path) -> None:
    for words in (["caf\udce9"], ["Hi", "--stop", "\udcff"]):
        done = invoke("generate", model, *words)
        assert done.returncode == 1 and done.stdout == ""
        assert "is not UTF-8 text: byte" in done.stderr and done.stderr.count("\n") == 1
    done = invoke("generate", model, "-", stdin=b"na\xefve")
    assert done.returncode == 1
    assert "stdin is not UTF-8 text: byte 2 is 0xef" in done.stderr


@pytest.mark.parametrize(
    ("locale", "piped"),
    [
        ({"LC_ALL": "POSIX"}, True),
        ({"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, False),
        ({"PYTHONIOENCODING": "ascii"}, True),
    ],
    ids=str,
)
def test_any_prompt_works_in_any_locale(model: Path, locale: dict[str, str], piped: bool) -> None:
    prompt = "# café 字 😀\nimport"
    expected = json.loads(invoke("generate", model, prompt, "-n", "4", "--json").stdout)
    done = subprocess.run(
        [*COLDSTREAM, "generate", str(model), "-" if piped else prompt, "-n", "4", "--json"],
        cwd=ROOT,
        env=os.environ | locale,
        input=prompt.encode() if piped else b"",
        capture_output=True,
        timeout=120,
        check=False,
    )
    document = json.loads(done.stdout)
    assert (document["prompt_tokens"], document["text"]) == (expected["prompt_tokens"], expected["text"])


def test_a_token_that_the_embedding_lacks_is_one_line(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(folder)
    done = invoke("generate", folder, "use <tool>", "-n", "2")
    assert done.returncode == 1
    assert "token 4,096" in done.stderr.splitlines()[-1] and "ends at 4,095" in done.stderr.splitlines()[-1]
    assert invoke("generate", folder, "use a tool", "-n", "2").returncode == 0


def test_what_a_model_writes_is_shown_and_does_nothing_else(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("generate", tiny("mixtral"), "Hi", "-n", "300", "--temperature", "1", "--seed", "1")
    shown, exact = invoke(*asked).stdout, json.loads(invoke(*asked, "--json").stdout)["text"]
    assert {"\x1b", "\a", "\n", "\t"} <= set(exact), "random bytes"
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown)
    assert "\\x1b" in shown and shown.count("\n") == exact.count("\n") + 1
