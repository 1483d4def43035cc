"""A conversation through a pipe and on a terminal."""

import json
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.commands import Terminal, invoke

QUESTION = "What does os.path.join do?"


@pytest.fixture
def terminal(model: Path, tmp_path: Path) -> Iterator[Terminal]:
    chat = Terminal("chat", model, "--max-tokens", "2000", XDG_STATE_HOME=str(tmp_path))
    yield chat
    chat.close()


@pytest.fixture
def screen(model: Path, tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    """Chats on a terminal that can do what today's can, all of one user."""
    opened: list[Terminal] = []

    def chat(*words: str) -> Terminal:
        opened.append(Terminal("chat", model, "-n", "4", *words, TERM="xterm", XDG_STATE_HOME=str(tmp_path / "state")))
        opened[-1].read_until("> ")
        return opened[-1]

    yield chat
    for terminal in opened:
        terminal.close()


def conversation(chat: Terminal, file: Path) -> list[dict[str, str]]:
    """The messages of ``chat``, which is waiting for one."""
    chat.type(f"/save {file}\r")
    chat.read_until("written to")
    found: list[dict[str, str]] = json.loads(file.read_text())["messages"]
    return found


def with_file(model: Path, folder: Path, name: str, content: object) -> Path:
    """A copy of ``model`` in which file ``name`` is ``content``."""
    shutil.copytree(model, folder)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


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


def test_save_replaces_an_earlier_conversation_and_nothing_else(model: Path, tmp_path: Path) -> None:
    saved, foreign = tmp_path / "conversation.json", tmp_path / "training.json"
    foreign.write_text('{"messages": [{"role": "user", "content": "years of work"}]}')
    places = (saved, foreign, tmp_path, tmp_path / "no" / "x", "/dev/full", "a\0b", saved)
    talk = "".join(f"/save {place}\n" for place in places)
    done = invoke("chat", model, "--max-tokens", "2", stdin=f"{talk}{QUESTION}\n/save {saved}\n")
    assert done.stderr.count("coldstream: error: ") == len(places) - 2, done.stderr
    assert len(json.loads(saved.read_text())["messages"]) == 2, "and the chat went on"
    assert "years of work" in foreign.read_text()


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
    asked = ("chat", model, "--context", "25", "--max-tokens", "200", "--temperature", "0")
    shown = invoke(*asked, stdin=QUESTION + "\n").stderr
    assert "(cut off: the context of 25 tokens is full; /reset" in shown and "--context" in shown
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


def test_what_is_pasted_is_one_message(screen: Callable[..., Terminal], tmp_path: Path) -> None:
    chat = screen()
    chat.type("\x1b[200~Explain:\n\n  def f(x):\r\n    return x\x1b[201~ Please.\r")
    chat.read_until("tokens/s")
    chat.type('\x1b[200~"""quoted\nand pasted"""\x1b[201~\r')
    chat.read_until("tokens/s")
    said = [message["content"] for message in conversation(chat, tmp_path / "c.json")[::2]]
    assert said == ["Explain:\n\n  def f(x):\n    return x Please.", "quoted\nand pasted"]


def test_lines_between_quotes_are_one_message(screen: Callable[..., Terminal], tmp_path: Path) -> None:
    chat = screen()
    for line in ('"""first', "", "  second", 'third"""'):
        chat.type(line + "\r")
        chat.read_until("tokens/s" if line.endswith('"""') else "… ")
    assert conversation(chat, tmp_path / "c.json")[0]["content"] == "first\n\n  second\nthird"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ('"""\none\n\n  two\n"""\n', "one\n\n  two"),
        ('"""one\ntwo"""\n', "one\ntwo"),
        ('"""one"""\n', "one"),
        ('"""\nan end without quotes\n', "an end without quotes"),
        ('"""\n/quit\n"""\n', "/quit"),
        ("/etc/passwd is\u2028a file\r\n", "/etc/passwd is\u2028a file"),
        ("  indented\n", "  indented"),
    ],
)
def test_quotes_work_through_a_pipe_too(model: Path, typed: str, said: str) -> None:
    done = invoke("chat", model, "-n", "2", "--json", stdin=typed)
    messages = json.loads(done.stdout)["messages"]
    if said.startswith("/etc"):
        assert messages == [] and done.returncode == 0, "a line with a slash is a command"
    else:
        assert messages[0]["content"] == said


def test_what_was_typed_comes_back_in_the_next_chat(screen: Callable[..., Terminal], tmp_path: Path) -> None:
    chat = screen()
    chat.type("\x1b[200~two\nlines\x1b[201~\r")
    chat.read_until("tokens/s")
    chat.type("/quit\r")
    assert chat.wait() == 0
    file = tmp_path / "state" / "coldstream" / "chat-history"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600, "for nobody else to read"
    chat = screen()
    chat.type("\x1b[A\x1b[A\r")  # up: /quit, up: the message
    chat.read_until("tokens/s")
    assert conversation(chat, tmp_path / "c.json")[0]["content"] == "two\nlines"


def test_a_history_that_cannot_be_written_is_no_failure(model: Path, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file where the folder should be")
    chat = Terminal("chat", model, "-n", "2", TERM="xterm", XDG_STATE_HOME=str(tmp_path / "state"))
    chat.read_until("> ")
    chat.type("Hi\r")
    chat.read_until("tokens/s")
    chat.read_until("> ")  # before, the terminal and not the chat would see the key
    chat.type("\x04")
    assert chat.wait() == 0
    assert "Traceback" not in chat.seen
    chat.close()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("{file}", "one\ntwo\n"),
        ("{file} What is this?", "one\ntwo\n\nWhat is this?"),
        ("'{file}' What's \"this\"?", 'one\ntwo\n\nWhat\'s "this"?'),
        ("{spaced}", "one\ntwo\n"),
        ('"{spaced}" Well?', "one\ntwo\n\nWell?"),
    ],
)
def test_a_file_is_said(model: Path, tmp_path: Path, words: str, said: str) -> None:
    names = {"file": tmp_path / "notes.txt", "spaced": tmp_path / "my notes.txt"}
    for file in names.values():
        file.write_text("one\ntwo\n")
    typed = "/file " + words.format(**names) + "\n"
    assert json.loads(invoke("chat", model, "-n", "2", "--json", stdin=typed).stdout)["messages"][0]["content"] == said


def test_what_cannot_be_said_is_one_line_and_the_chat_goes_on(model: Path, tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    typed = f"/file\n/file {tmp_path}/absent\n/file {tmp_path}\n/file {tmp_path}/latin\n/file {'x' * 9000}\n".encode()
    done = invoke("chat", model, "-n", "2", stdin=typed + b"caf\xe9\n" + b"Hi\n")
    assert done.returncode == 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("coldstream: error: ")]
    assert len(errors) == 6 and "UTF-8" in errors[-1]
    assert done.stderr.count("tokens/s,") >= 1, "Hi was answered"
    assert invoke("chat", model, "-n", "2", stdin=b"caf\xe9\n").returncode == 1, "nothing was"


def test_every_answer_is_followed_by_its_speed_but_not_when_quiet(model: Path) -> None:
    line = re.compile(r"^\(\d+ tokens, [\d,.]+ tokens/s, .* expert hits\)$", re.MULTILINE)
    talk = f"{QUESTION}\nAnd os.getcwd?\n"
    assert len(line.findall(invoke("chat", model, "-n", "9", stdin=talk).stderr)) == 2
    assert not line.findall(invoke("chat", model, "-n", "9", "-q", stdin=talk).stderr)


def test_an_answer_may_be_as_long_as_the_context(model: Path, tmp_path: Path) -> None:
    endless = with_file(model, tmp_path / "m", "generation_config.json", {"eos_token_id": 4095})
    done = invoke("chat", endless, "--context", "400", "--json", stdin=QUESTION + "\n")
    document = json.loads(done.stdout)
    assert document["finish_reason"] == "context"
    assert len(document["timeline"]["ms"]) > 300


RECOMMENDED = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 50, "eos_token_id": [1, 4]}


@pytest.mark.parametrize(
    ("recommended", "asked", "told"),
    [
        ({}, [], "greedy"),
        (RECOMMENDED, [], "temperature 0.6, top k 50, top p 0.9 (by generation_config.json)"),
        (
            RECOMMENDED,
            ["--temperature", "0.2", "--seed", "3"],
            "temperature 0.2, seed 3; top k 50, top p 0.9 (by generation_config.json)",
        ),
        (RECOMMENDED, ["--temperature", "0"], "greedy"),
        (RECOMMENDED | {"do_sample": False}, [], "greedy"),
        ({"do_sample": True}, [], "temperature 1.0 (by generation_config.json)"),
        ({"repetition_penalty": 1.1}, [], "greedy; repetition penalty 1.1 (by generation_config.json)"),
        ({"do_sample": True, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}, ["--min-p", "0.1"], None),
    ],
)
@pytest.mark.parametrize("command", ["chat", "generate"])
def test_sampling_is_as_the_model_recommends_and_the_options_win(
    model: Path, tmp_path: Path, command: str, recommended: dict[str, object], asked: list[str], told: str | None
) -> None:
    folder = with_file(model, tmp_path / "m", "generation_config.json", recommended)
    words = [command, folder, *(["Hi"] if command == "generate" else []), "-n", "2", *asked]
    shown = invoke(*words, stdin="Hi\n").stderr
    [line] = [line for line in shown.splitlines() if line.startswith("coldstream: sampling: ")]
    told = told or "min p 0.1; temperature 1.0 (by generation_config.json)"
    assert line == f"coldstream: sampling: {told}"


@pytest.mark.parametrize(
    "broken", ["[]", "{", '{"do_sample": 3}', '{"do_sample": true, "temperature": -1}', '{"top_p": "0.9"}']
)
@pytest.mark.parametrize("command", ["chat", "generate"])
def test_a_broken_recommendation_is_one_line(model: Path, tmp_path: Path, command: str, broken: str) -> None:
    folder = with_file(model, tmp_path / "m", "generation_config.json", broken)
    done = invoke(command, folder, *(["Hi"] if command == "generate" else []), stdin="Hi\n")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("coldstream: error: ") and "generation_config.json" in done.stderr
    assert done.stderr.count("\n") == 1


NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role!') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}\n{% endfor %}"
)


def test_a_template_that_refuses_ends_neither_the_chat_nor_its_conversation(model: Path, tmp_path: Path) -> None:
    folder = with_file(model, tmp_path / "m", "chat_template.jinja", NO_SYSTEM)
    talk = "Hi\n/system Be brief.\nHello\n/system\nHello again\n"
    done = invoke("chat", folder, "-n", "2", "--json", "--system", "Be brief.", stdin=talk)
    assert done.returncode == 0
    assert json.loads(done.stdout)["messages"][0]["content"] == "Hello again"
    shown = invoke("chat", folder, "-n", "2", "--system", "Be brief.", stdin=talk).stderr
    assert shown.count("coldstream: error: the model's chat template cannot put this conversation: ") == 3
    assert "no system role!" in shown and "Traceback" not in shown


@pytest.mark.parametrize("template", ["{% if %}", "{{ nothing.at.all }}", "{{ 'x' * 10 ** 10 }}"])
def test_a_template_that_never_works_is_said_for_every_message(model: Path, tmp_path: Path, template: str) -> None:
    folder = with_file(model, tmp_path / "m", "chat_template.jinja", template)
    done = invoke("chat", folder, stdin="Hi\nHello\n")
    assert done.returncode == 1, "nothing was answered"
    assert done.stderr.count("coldstream: error: ") == 3 and "Traceback" not in done.stderr


def test_the_oldest_turns_are_left_out_when_the_context_is_full(model: Path) -> None:
    talk = "".join(f"Question {number}: {'word ' * 20}\n" for number in range(8))
    done = invoke("chat", model, "--context", "160", "-n", "8", "--system", "Be brief.", stdin=talk)
    assert done.returncode == 0 and "coldstream: error" not in done.stderr
    notes = [line for line in done.stderr.splitlines() if "the model no longer sees" in line]
    assert 1 <= len(notes) < 8 and "--context" in notes[0]
    document = json.loads(invoke("chat", model, "--context", "160", "-n", "8", "--json", stdin=talk).stdout)
    assert len(document["messages"]) == 16, "the conversation is kept whole"
    assert max(document["timeline"]["tokens_in"]) < 160


def test_a_person_is_asked_before_turns_are_left_out(screen: Callable[..., Terminal], tmp_path: Path) -> None:
    chat = screen("--context", "64")
    chat.type("First " + "word " * 20 + "\r")
    chat.read_until("tokens/s")
    chat.type("Second " + "word " * 20 + "\r")
    chat.read_until("Go on without the oldest turn? [Y/n] ")
    chat.type("What else?\r")
    chat.read_until("n for no: ")
    chat.type("n\r")
    chat.read_until("not sent")
    assert len(conversation(chat, tmp_path / "c.json")) == 2
    chat.type("Third " + "word " * 20 + "\r")
    chat.read_until("[Y/n] ")
    chat.type("\r")
    chat.read_until("tokens/s")
    assert len(conversation(chat, tmp_path / "c.json")) == 4


def test_a_conversation_goes_on_another_day(model: Path, tmp_path: Path) -> None:
    file, cache = tmp_path / "talk.json", tmp_path / "cache"
    words = ("chat", model, "-n", "8", "--context", "1024", "--json")
    long = " ".join(["os.path.join"] * 60)
    kept = ("--resume", file, "--prompt-cache", cache)
    first = invoke(*words, *kept, stdin=f"{long}\n")
    assert first.returncode == 0, first.stderr
    assert [turn["role"] for turn in json.loads(file.read_text())["messages"]] == ["user", "assistant"]
    saved = file.read_bytes()
    with_cache = json.loads(invoke(*words, *kept, stdin="And why?\n").stdout.splitlines()[-1])
    file.write_bytes(saved)
    without = json.loads(invoke(*words, "--resume", file, stdin="And why?\n").stdout.splitlines()[-1])
    assert with_cache["messages"] == without["messages"] and len(without["messages"]) == 4
    computed, reused = with_cache["prefill"]["tokens"], with_cache["prefill"]["reused"]
    # All but the last block, which the model's own tokens of its answer are in: the template may tell it in others.
    assert computed < 128 <= reused["disk"] and computed + reused["disk"] == without["prefill"]["tokens"]
    assert not without["prefill"]["reused"]["disk"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}", "not of this kind"),
        ('{"command": "chat", "messages": [{"role": "cat", "content": ""}]}', "messages.0.role"),
    ],
)
def test_a_file_without_a_conversation_is_refused(model: Path, tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "talk.json"
    file.write_text(content)
    done = invoke("chat", model, "--resume", file)
    assert (done.returncode, done.stdout) == (1, "") and said in done.stderr and file.read_text() == content


def test_a_chat_that_is_killed_has_saved_what_was_said(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    chat = Terminal("chat", model, "--max-tokens", "2000", "--resume", file, XDG_STATE_HOME=str(tmp_path))
    try:
        chat.read_until("> ")
        chat.type(f"{QUESTION}\n")
        chat.read_until("\n")
        chat.read_until("\n")  # some of the answer
        chat.process.terminate()
        assert chat.wait() == 143
    finally:
        chat.close()
    question, answer = json.loads(file.read_text())["messages"]
    assert question["content"] == QUESTION and answer["content"]


def test_what_a_chat_says_is_wrapped_at_words(model: Path, tmp_path: Path) -> None:
    chat = Terminal(
        "chat", model, "-n", "4", XDG_STATE_HOME=str(tmp_path)
    )  # a terminal that says no more has 80 columns
    try:
        chat.read_until("> ")
        for line in (QUESTION, "/help", "/file", "/stats", "/quit"):
            chat.type(f"{line}\n")
        assert chat.wait() == 0
        said = chat.seen.replace("\r", "").split("(4 tokens", 1)[1]
        for command in ("/file PATH [TEXT]", "/system TEXT", '"""'):
            assert command in said
        assert "/file needs a path" in " ".join(said.split())
        assert max(map(len, said.splitlines())) <= 80
    finally:
        chat.close()
