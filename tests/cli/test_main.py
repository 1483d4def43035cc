"""The frame of the command line: help, errors as one line, exit codes."""

import _thread
import gc
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cli.main import COMMANDS, PIPE_CLOSED, one_line_errors
from cli.terminal.imports import seldom_collecting
from cli.terminal.interrupt import INTERRUPTED
from offload.hardware.gpu_catalog import CARDS
from offload.routing.eviction import POLICIES
from quant.errors import BudgetError, UsageError
from quant.model.recipe import recipe_names
from tests.commands import COLDSTREAM, ROOT, coldstream, invoke


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_answers_in_half_a_second(command: str | None) -> None:
    """Counted in processor time, which other work on the machine does not change much."""
    took = []
    while len(took) < 3 and min(took, default=1) >= 0.5:  # it may still meet another's use of one core's caches
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = coldstream(*([command] if command else []), "--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        assert "Usage: coldstream" in done.stdout
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(took) < 0.5, took


@pytest.mark.parametrize("command", COMMANDS)
def test_the_module_of_a_command_imports_neither_torch_nor_transformers(command: str) -> None:
    heavy = ("torch", "transformers", "rich", "numpy")
    module = f"cli.commands.{command.replace('-', '_')}"
    code = f"import {module}, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_every_command_is_listed_with_what_it_does() -> None:
    listed = coldstream("--help").stdout
    for name, summary in COMMANDS.items():
        assert f"  {name} " in listed
        assert summary in listed, "the summary does not fit on one line of 80"


def test_garbage_is_looked_for_seldom_while_importing_and_as_before_afterwards() -> None:
    before = gc.get_threshold()
    looks: list[str] = []
    gc.callbacks.append(count := lambda phase, info: looks.append(phase))
    try:
        with seldom_collecting():
            kept = [[] for _ in range(100_000)]  # type: ignore[var-annotated]
        inside = len(looks)
        more = [[] for _ in range(100_000)]  # type: ignore[var-annotated]
    finally:
        gc.callbacks.remove(count)
    assert len(kept) == len(more) and 10 * inside < len(looks) - inside
    assert gc.get_threshold() == before


def test_version_is_printed_and_nothing_else_happens() -> None:
    done = coldstream("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("coldstream ")


def test_a_users_error_is_one_line_on_stderr_and_exit_code_1(tmp_path: Path) -> None:
    done = coldstream("generate", str(tmp_path / "nothing"), "hello")
    assert done.returncode == 1
    assert done.stdout == ""
    [line] = [line for line in done.stderr.splitlines() if "error" in line]
    assert line.startswith("coldstream: error: ")
    assert "nothing" in line
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["generate"],
        ["generate", "model", "prompt", "--no-such-option"],
        ["generate", "model", "prompt", "--vram", "much"],
        ["generate", "model", "prompt", "--kv", "int3"],
        ["generate", "model", "prompt", "--top-p", "7"],
    ],
)
def test_wrong_usage_exits_2_without_a_traceback(arguments: list[str]) -> None:
    done = coldstream(*arguments)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("coldstream: error: ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["genrate"], "no such command 'genrate'. Did you mean 'generate'?; see `coldstream --help`"),
        (
            ["generate", "m"],
            "missing argument 'PROMPT': expected coldstream generate [OPTIONS] MODEL PROMPT; "
            "see `coldstream generate --help`",
        ),
        (["plan", "m", "--gqu", "x"], "no such option: --gqu (Possible options: --gpu"),
        (["bench", "m", "--repeat", "0"], "--repeat 0: expected 1 or more; see `coldstream bench --help`"),
        (["bench", "m", "--repeat", "1.5"], "--repeat 1.5: expected a whole number; see"),
        (["serve", "m", "--port", "99999"], "--port 99999: expected 65,535 or less; see"),
        (["generate", "m", "p", "--report", ""], "--report: found an empty name: leave the option out, or give one"),
        (["generate", "m", "p", "--stop"], "option '--stop' requires an argument"),
    ],
)
def test_wrong_usage_is_one_line_with_what_was_found_and_expected_and_a_document(words: list[str], said: str) -> None:
    done = invoke(*words)
    assert done.returncode == 2 and not done.stdout
    [line] = done.stderr.splitlines()
    assert line.startswith(f"coldstream: error: {said}")
    done = invoke("plan", "m", "--json", *words)
    assert done.returncode == 2 and json.loads(done.stdout)["error"]["kind"] == "UsageError"


def test_no_words_at_all_are_answered_by_the_help() -> None:
    done = invoke()
    assert done.returncode == 0 and "Usage: coldstream" in done.stdout and "generate" in done.stdout


def test_a_bad_size_says_what_a_size_looks_like() -> None:
    done = coldstream("generate", "model", "prompt", "--ram", "64 gigs")
    assert "'64 gigs'" in done.stderr
    assert "24GiB" in done.stderr


def test_an_error_of_several_lines_is_still_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, one_line_errors():
        raise BudgetError("found this\n  expected that")
    assert ended.value.code == 1
    assert capsys.readouterr().err == "coldstream: error: found this expected that\n"


def test_arguments_that_contradict_each_other_exit_2() -> None:
    with pytest.raises(SystemExit) as ended, one_line_errors():
        raise UsageError("both")
    assert ended.value.code == 2


def test_ctrl_c_exits_130_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, one_line_errors():
        raise KeyboardInterrupt
    assert ended.value.code == INTERRUPTED
    assert "Traceback" not in capsys.readouterr().err


def test_a_closed_pipe_ends_the_command_quietly() -> None:
    code = "import cli.main\nwith cli.main.one_line_errors():\n    while True: print('x' * 1000, flush=True)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(30) == PIPE_CLOSED
    assert process.stderr.read() == ""
    process.stderr.close()


def test_a_programming_error_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError), one_line_errors():
        _ = 1 / 0


def test_json_documents_are_the_last_line_of_stdout_and_stderr_is_silent(demo_model: Path) -> None:
    done = coldstream("plan", str(demo_model), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["predicted_tokens_per_s"] > 0
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("coldstream pl", ["plan"]),
        ("coldstream plan --disk", ["--disk-bandwidth"]),
        ("coldstream generate --policy l", ["lru", "lfu"]),
        ("coldstream quantize --recipe scout", ["scout-16gb", "scout-16gb-2bit", "scout-rtx4090"]),
        ("coldstream plan --gpu RTX-409", ["RTX-4090", "RTX-4090-D", "RTX-4090-Laptop"]),
        ("coldstream plan --gpu 3090", ["3090", "3090-Ti"]),
        ("coldstream plan --gpu quadro-rtx-8", ["quadro-rtx-8000"]),
    ],
)
def test_a_shell_is_told_what_could_come_next(words: str, offered: list[str]) -> None:
    asked = {"_COLDSTREAM_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    done = subprocess.run(COLDSTREAM, cwd=ROOT, capture_output=True, text=True, timeout=60, env={**os.environ, **asked})
    assert done.stdout.split() == offered, done.stderr


def test_every_name_that_an_option_takes_is_in_its_help() -> None:
    # Lines are wrapped at blanks and behind hyphens: compared is what stands there without any blank.
    helped = {name: "".join(coldstream(name, "--help").stdout.split()) for name in ("generate", "plan", "quantize")}
    for recipe in recipe_names():
        assert all(recipe in text for text in helped.values())
    assert all(policy in helped["generate"] for policy in POLICIES)
    assert "auto" in helped["quantize"]
    cards = [card.name.removeprefix("RTX ").replace(" ", "") for card in CARDS if card.capability >= 8]
    assert all(card in helped["plan"] for card in cards)


@pytest.mark.parametrize(
    ("words", "code", "kind"),
    [
        (["plan", "scout", "--gpu", "Voodoo 2"], 2, "UsageError"),
        (["plan", "behemoth", "--gpu", "RTX 4090"], 1, "BudgetError"),
        (["plan"], 2, "UsageError"),
        (["plan", "scout", "--no-such-option"], 2, "UsageError"),
        (["generate", "nowhere", "hello"], 1, "CheckpointError"),
    ],
)
def test_a_failure_is_a_document_too_and_keeps_its_exit_code(words: list[str], code: int, kind: str) -> None:
    done = invoke(*words, "--json")
    assert done.returncode == code and done.stdout.count("\n") == 1
    error = json.loads(done.stdout)["error"]
    assert (error["kind"], error["exit_code"]) == (kind, code)
    assert error["message"] in " ".join(done.stderr.split())


def limited(limit: str, *words: str) -> subprocess.CompletedProcess[str]:
    """``coldstream WORDS`` in a shell after ``limit``."""
    return subprocess.run(
        ["bash", "-c", f'{limit}; exec "$@"', "bash", *COLDSTREAM, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_no_threads_are_started_that_nothing_uses() -> None:
    code = """if True:
        import sys
        from cli.main import main
        sys.argv = ["coldstream", "--version"]
        main()
        import numpy, threading, pathlib
        print(len(list(pathlib.Path("/proc/self/task").iterdir())))
    """
    environment = {key: value for key, value in os.environ.items() if key != "OPENBLAS_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "1", done.stderr


def test_where_few_threads_start_openmp_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert invoke("plan", "mini-scout").returncode == 0 and os.environ["OMP_NUM_THREADS"] == "7"
    start, left = _thread.start_new_thread, iter([None] * 3)

    def refused(*words: Any) -> int:
        if next(left, words) is words:
            raise RuntimeError("can't start new thread")
        return start(*words)

    tasks = Path("/proc/self/task")
    before = len(list(tasks.iterdir()))
    monkeypatch.setattr(_thread, "start_new_thread", refused)
    assert invoke("rank-policies", "uniform", "--sizes", "2", "--tokens", "8").returncode == 0
    assert os.environ["OMP_NUM_THREADS"] == "1"
    end = time.monotonic() + 20
    while len(list(tasks.iterdir())) > before:
        assert time.monotonic() < end, "they end by themselves"


def test_too_few_files_are_one_line() -> None:
    done = limited("ulimit -n 16", "plan", "mini-scout")
    assert done.returncode == 1
    assert done.stderr.startswith("coldstream: error: this process may open 16 files") and done.stderr.count("\n") == 1
    assert limited("ulimit -Sn 16", "plan", "mini-scout").returncode == 0, "it may have more"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_failure(closed: str) -> None:
    done = limited(f"exec {closed}", "plan", "mini-scout")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--help"], "No space left on device"),
        (["plan", "mini-scout", "--json"], "no space left to write stdout"),
        (["generate", "MODEL", "Hi"], "no space left to write stdout"),  # before the model is looked for
        (["plan", "ABSENT", "--json"], "no space left to write stdout"),
    ],
)
def test_a_full_disk_is_one_line(words: list[str], said: str) -> None:
    done = limited("exec >/dev/full", *words)
    assert done.returncode == 1
    assert said in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(24, "Too many open files", "model.safetensors"), "model.safetensors: Too many open files"),
        (PermissionError(13, "Permission denied", "a\x1b[31m"), r"a\x1b[31m: Permission denied"),
        (MemoryError(), "there is not enough memory"),
        (RuntimeError("can't start new thread"), "no thread can be started"),
    ],
)
def test_what_the_machine_refuses_is_one_line(error: Exception, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise error
    assert end.value.code == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"coldstream: error: {said}") and shown.count("\n") == 1


def test_errors_in_the_program_itself_are_not_hidden() -> None:
    with pytest.raises(RuntimeError), one_line_errors():
        raise RuntimeError("a bug")


@pytest.mark.parametrize("words", [("--kv", "int4"), ("--device", "tpu"), ("--draft", "x")])
def test_a_choice_that_is_none_is_named_beside_those_that_are(words: tuple[str, str]) -> None:
    said = coldstream("generate", "nowhere", "x", *words).stderr
    assert f"coldstream: error: {words[0]}: '{words[1]}' is not one of '" in said


def test_wrong_usage_shows_foreign_characters_harmlessly() -> None:
    done = invoke("plan", "mini-scout", "--\x1b[31m")
    assert done.returncode == 2
    assert "\x1b" not in done.stderr and r"\x1b[31m" in done.stderr
