"""A conversation through a pipe and on a terminal."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import Terminal, invoke

QUESTION = "What does os.path.join do?"


@pytest.fixture
def terminal(model: Path) -> Iterator[Terminal]:
    chat = Terminal("chat", model, "--max-tokens", "2000")
    yield chat
    chat.close()


def test_questions_from_a_pipe_are_answered_on_stdout_and_the_report_follows(model: Path, tmp_path: Path) -> None:
    saved = tmp_path / "conversation.json"
    talk = f"{QUESTION}\n/stats\n/save {saved}\n\nAnd os.getcwd?\n/nonsense\n/quit\nnever read\n"
    done = invoke("chat", model, "--max-tokens", "12", stdin=talk)
    assert done.returncode == 0, done.stderr
    messages = json.loads(saved.read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert messages[1]["content"].strip()
    assert messages[1]["content"] in done.stdout
    assert "/nonsense is no command" in done.stderr
    assert done.stderr.count("  decode ") == 2, "once for /stats and once at the end"
    assert "decode" not in done.stdout


def test_json_ends_with_the_whole_conversation_and_the_report(model: Path) -> None:
    done = invoke("chat", model, "--json", "--max-tokens", "8", "--system", "Be brief.", stdin=QUESTION + "\n")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    document = json.loads(done.stdout)
    assert [message["role"] for message in document["messages"]] == ["system", "user", "assistant"]
    assert document["decode"]["tokens_per_s"] > 0
    assert document["memory"]["ram"]


def test_the_second_turn_runs_only_what_is_new(model: Path) -> None:
    done = invoke("chat", model, "--json", "--max-tokens", "40", stdin=f"{QUESTION}\nAnd getcwd?\n")
    timeline = json.loads(done.stdout)["timeline"]
    first, second = [n for n, phase in zip(timeline["tokens_in"], timeline["phase"], strict=True) if phase == "prefill"]
    answer = timeline["phase"].index("prefill", 1)
    assert second < first + answer, "the second prefill ran the first turn again"


def test_a_conversation_that_outgrows_its_context_says_so_and_goes_on(model: Path) -> None:
    long = "word " * 200
    done = invoke("chat", model, "--context", "64", "--max-tokens", "4", stdin=f"{long}\nHi\n")
    assert done.returncode == 0
    assert "--context" in done.stderr
    assert "Traceback" not in done.stderr
    assert "tokens/s" in done.stderr, "the short question was answered"


def test_an_answer_that_fills_the_context_says_so(model: Path) -> None:
    asked = ("chat", model, "--context", "40", "--max-tokens", "200")
    shown = invoke(*asked, stdin=QUESTION + "\n").stderr
    assert "(cut off: the context of 40 tokens is full; /reset" in shown and "--context" in shown
    assert json.loads(invoke(*asked, "--json", stdin=QUESTION + "\n").stdout)["finish_reason"] == "context"


def test_an_end_without_a_question_is_no_error(model: Path) -> None:
    assert invoke("chat", model, stdin="").returncode == 0


def test_ctrl_c_stops_the_answer_and_keeps_the_session(terminal: Terminal) -> None:
    terminal.read_until("> ")
    terminal.type("Write a long story about every module.\n")
    terminal.read_until("\n")
    terminal.read_until("\n")  # some of the answer
    terminal.interrupt()
    terminal.read_until("(stopped)", seconds=5)
    terminal.read_until("> ")
    time.sleep(0.5)  # between the prompt and the waiting for a key, a signal is not seen until the key
    terminal.interrupt()
    terminal.read_until("ends the chat")
    terminal.type("/stats\n")
    terminal.read_until("  context")
    terminal.type("/quit\n")
    assert terminal.wait() == 0


def test_ctrl_d_quits_with_the_report(terminal: Terminal) -> None:
    terminal.read_until("> ")
    terminal.type("/help\n")
    terminal.read_until("/quit")
    terminal.read_until("> ")  # before, the terminal and not the chat would see the key
    terminal.type("\x04")
    assert terminal.wait() == 0
    assert "Traceback" not in terminal.seen
