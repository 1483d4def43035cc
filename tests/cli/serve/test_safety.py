"""What clients do wrong, and how a server ends: the next good request is answered all the same."""

import asyncio
import contextlib
import http.client
import json
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cli.serve.server import Server, bind
from cli.terminal.console import Console
from tests.cli.serve.running import KEY, Running
from tests.commands import coldstream

ASK = {"messages": [{"role": "user", "content": "def main"}], "max_tokens": 8}
ENDLESS = ASK | {"max_tokens": 400, "logit_bias": {"1": -100, "4": -100}, "stream": True}
SAY = [{"role": "user", "content": "def main"}, {"role": "assistant", "content": "x"}]
PATH = "/v1/chat/completions"


def raw(server: Running, sent: bytes, read: int = 0) -> bytes:
    """What comes back for ``sent``, up to ``read`` bytes; then the connection is dropped."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(sent)
        return connection.recv(read) if read else b""


def request(body: bytes, path: str = PATH, key: str = KEY, size: int | None = None) -> bytes:
    length = len(body) if size is None else size
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\nContent-Length: {length}\r\n\r\n"
    return head.encode() + body


def idle(server: Running) -> None:
    """Wait until no answer is under way."""
    end = time.monotonic() + 20
    while server.ask("GET", "/slots")[2]:
        assert time.monotonic() < end, "an answer that nobody waits for goes on"
        time.sleep(0.02)


def misbehave(server: Running, chance: random.Random) -> None:
    """One request as no client should make it."""
    endless = json.dumps(ENDLESS).encode()
    match chance.randrange(9):
        case 0:
            raw(server, request(endless), chance.choice([1, 100, 2000]))  # hangs up in the midst
        case 1:
            raw(server, request(endless)[: chance.randrange(10, 200)])  # half a request
        case 2:
            raw(server, request(b"{" * chance.randrange(1, 100_000)), 100)
        case 3:
            raw(server, request(b"{}", size=1 << 40), 100)  # says that it is enormous
        case 4:
            raw(server, request(endless, key=KEY + "x"), 100)
        case 5:
            raw(server, bytes(chance.randrange(256) for _ in range(300)) + b"\r\n\r\n", 100)
        case 6:
            raw(server, request(json.dumps(ASK | {"temperature": "hot", "n": -1}).encode()), 100)
        case 7:
            raw(server, request(json.dumps(ENDLESS | {"stream": False, "n": 3}).encode()))
        case 8:
            raw(server, request(b"\xff\xfe", path=chance.choice(["/v1/messages", "/tokenize", "/v1/responses"])), 100)


def test_after_any_misbehaviour_the_next_good_request_is_answered(server: Running) -> None:
    chance = random.Random(0)
    descriptors = server.descriptors
    rss = 0
    for number in range(60):
        misbehave(server, chance)
        if number % 10 == 9:
            idle(server)
            status, _, document = server.ask("POST", PATH, ASK)
            assert status == 200 and document["choices"][0]["message"]["content"]
        if number == 19:
            rss = server.rss_bytes
    assert server.rss_bytes < rss * 1.05
    assert server.descriptors <= descriptors + 4


def test_a_body_beyond_the_limit_is_413_in_each_dialect(server: Running) -> None:
    for path, kind in ((PATH, b"invalid_request_error"), ("/v1/messages", b"request_too_large")):
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            connection.sendall(request(b"{}", path=path, size=1 << 40))
            answer = b""
            while kind not in answer and (more := connection.recv(4000)):
                answer += more
        assert answer.startswith(b"HTTP/1.1 413 ") and kind in answer


def test_a_full_queue_is_429_with_a_time_to_come_again(server: Running) -> None:
    waiting = []
    for _ in range(5):  # 16 at once, and 24 that wait
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
        connection.sendall(request(json.dumps(ENDLESS | {"n": 8}).encode()))
        assert connection.recv(12) == b"HTTP/1.1 200"
        waiting.append(connection)
    status, headers, document = server.ask("POST", PATH, ASK | {"n": 8})
    other = server.ask("POST", "/v1/messages", ASK | {"max_tokens": 1})[2]
    for connection in waiting:
        connection.close()
    assert status == 429 and int(headers["retry-after"]) >= 1
    assert document["error"]["type"] == "rate_limit_error"
    assert other.get("type") in ("message", "error")
    idle(server)
    assert server.ask("POST", PATH, ASK)[0] == 200


def test_nothing_of_a_prompt_is_said_on_the_servers_terminal(server: Running) -> None:
    server.ask("POST", PATH, {**ASK, "messages": [{"role": "user", "content": "a-secret-of-mine"}]})
    server.ask("POST", PATH, {"messages": "a-secret-of-mine"})
    assert not any("a-secret-of-mine" in line for line in server.said)


def under_way(running: Running) -> tuple[threading.Thread, list[str]]:
    """An answer that is being given, and where it will be found."""
    found: list[str] = []

    def ask() -> None:
        with contextlib.suppress(http.client.HTTPException, OSError):
            found.append(running.ask("POST", PATH, ENDLESS)[2])

    asking = threading.Thread(target=ask)
    asking.start()
    while not running.ask("GET", "/slots")[2] and not found:
        pass
    return asking, found


def test_the_first_interrupt_lets_an_answer_finish(model: Path) -> None:
    running = Running(model, "--api-key", KEY)
    asking, found = under_way(running)
    running.process.send_signal(signal.SIGTERM)
    asking.join()
    assert running.process.wait(30) == 0 and running.end() == 0
    assert found[0].endswith("data: [DONE]\n\n") and "".join(running.said).count("under way are finished first") == 1


def test_the_second_interrupt_ends_at_once(model: Path) -> None:
    running = Running(model, "--api-key", KEY, "--timeout", "60", "--parallel", "2")
    assert running.ask("GET", "/props")[2]["total_slots"] == 2
    connections = []
    for _ in range(3):  # none of which takes anything, one of which waits: they would go on for long
        connection = socket.create_connection(("127.0.0.1", running.port), timeout=30)
        connection.sendall(request(json.dumps(ENDLESS | {"max_tokens": 900, "n": 8}).encode()))
        assert connection.recv(12) == b"HTTP/1.1 200"
        connections.append(connection)
    running.process.send_signal(signal.SIGINT)
    while not any("finished first" in line for line in running.said):
        time.sleep(0.01)
    assert running.process.poll() is None
    started = time.monotonic()
    assert running.end() == 130 and time.monotonic() - started < 2
    for connection in connections:
        connection.close()


def test_a_request_that_takes_too_long_is_ended_and_not_asked_again(model: Path) -> None:
    running = Running(model, "--timeout", "1")
    try:
        slow = ENDLESS | {"n": 16, "max_tokens": 1000, "stream": False}
        status, headers, document = running.ask("POST", PATH, slow)
        streamed = running.ask("POST", PATH, slow | {"stream": True})[2]
        said = running.ask("POST", "/v1/messages", slow | {"n": 1, "messages": SAY * 40})[2]
        assert (status, headers["x-should-retry"]) == (408, "false")
        assert document["error"]["type"] == "timeout_error" and "--timeout" in document["error"]["message"]
        assert '"timeout_error"' in streamed and not streamed.endswith("[DONE]\n\n")
        assert said["type"] in ("message", "error")
        idle(running)
        assert running.ask("POST", PATH, ASK)[0] == 200
    finally:
        running.end()


def test_who_sends_or_takes_nothing_is_cut_off(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, where a minute can be a second: connections that idle, drip, or are not read."""
    monkeypatch.setattr("cli.serve.server.HEAD_SECONDS", 0.5)
    monkeypatch.setattr("cli.serve.server.WRITE_SECONDS", 0.5)
    gone = threading.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(64):
            await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass
        gone.set()

    with listening(app) as port:
        silent, drips, deaf = (socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(3))
        deaf.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            for letter in b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 100:
                drips.sendall(bytes([letter]))
                time.sleep(0.05)
            pytest.fail("headers may drip for ever")
        assert silent.recv(1) == b""
        assert gone.wait(10), "who takes nothing keeps its answer"
        for connection in (silent, drips, deaf):
            connection.close()


@contextlib.contextmanager
def listening(app: Any) -> Iterator[int]:
    """The port at which ``app`` is served by the server's own process, in a thread."""
    with bind("127.0.0.1", 0) as bound:
        made = Server(app, Console(quiet=True), "")
        made.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
        thread = threading.Thread(target=lambda: asyncio.run(made.serve([bound])), daemon=True)
        thread.start()
        while not made.started:
            time.sleep(0.01)
        try:
            yield bound.getsockname()[1]
        finally:
            made.force_exit = made.should_exit = True
            thread.join(10)


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--host", "0.0.0.0"], 2, "no --api-key is given"),
        (["--host", "::"], 2, "no --api-key is given"),
        (["--api-key", ""], 2, "is no key"),
        (["--port", "99999"], 2, "--port"),
        (["--host", "203.0.113.1", "--api-key", "x"], 1, "cannot serve at 203.0.113.1:8080"),
    ],
)
def test_what_would_be_open_to_others_must_be_said_twice(model: Path, options: list[str], code: int, said: str) -> None:
    done: subprocess.CompletedProcess[str] = coldstream("serve", str(model), *options)
    assert done.returncode == code and said in done.stderr and "Traceback" not in done.stderr
