"""What goes wrong on the way to an answer is the client's to know, and the log's where nobody expected it."""

import asyncio
import json
from typing import Any

import pytest

from cli.serve import page
from cli.serve.app import make_app
from cli.serve.guard import Access


def asked(path: str) -> tuple[int, Any]:
    """Status and document of the answer to ``GET path`` of an app that serves nothing."""
    service: Any = None
    app = make_app(service, Access())
    scope = {"type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "query_string": b""}
    scope |= {"headers": [(b"host", b"localhost")], "http_version": "1.1", "scheme": "http", "root_path": ""}
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))  # type: ignore[arg-type]
    return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent))


def test_where_no_thread_starts_the_client_is_told_and_the_log_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def live(service: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(page, "_live", live)
    status, document = asked("/live")
    assert status == 503 and "raise `ulimit -u`" in document["error"]["message"]


def test_what_nobody_expected_is_raised_for_the_log_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def live(service: object) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(page, "_live", live)
    with pytest.raises(RuntimeError, match="something else"):
        asked("/live")
