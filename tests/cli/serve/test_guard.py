"""Who is let through, by table: Host, Origin and key."""

import asyncio
from typing import Any

import pytest
from starlette.responses import PlainTextResponse

from cli.serve.guard import Access, Guard

OURS = {"host": "127.0.0.1:8080"}


def status(access: Access, headers: dict[str, str], path: str = "/v1/models", method: str = "GET") -> tuple[int, Any]:
    """What a request comes to, and the headers of the answer."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": raw}
    asyncio.run(Guard(PlainTextResponse("inside"), access)(scope, receive, send))
    return sent[0]["status"], {name.decode(): value.decode() for name, value in sent[0]["headers"]}


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("127.0.0.1:8080", True),
        ("localhost", True),
        ("localhost:8080", True),
        ("[::1]:8080", True),
        ("192.168.1.7:8080", True),
        ("host.docker.internal:8080", True),
        ("models.example:443", True),
        ("evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example:8080", False),
        ("", False),
        ("127.0.0.1@evil.example", False),
    ],
)
def test_a_host_is_an_address_or_a_name_that_is_ours(host: str, known: bool) -> None:
    assert status(Access(hosts=["Models.example"]), {"host": host})[0] == (200 if known else 403)


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("http://127.0.0.1:8080", True),
        ("http://127.0.0.1:9999", False),
        ("http://evil.example", False),
        ("null", False),
        ("https://chat.example", True),
        ("https://chat.example.evil.example", False),
    ],
)
def test_a_page_from_elsewhere_is_refused(origin: str, allowed: bool) -> None:
    access = Access(origins=["https://chat.example"])
    assert status(access, OURS | {"origin": origin})[0] == (200 if allowed else 403)
    code, headers = status(access, OURS | {"origin": origin}, method="OPTIONS")
    assert (code == 204) == (origin == "https://chat.example")
    assert headers.get("access-control-allow-origin") == ("https://chat.example" if code == 204 else None)


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, 401),
        ({"authorization": "Bearer one"}, 200),
        ({"authorization": "bearer two "}, 200),
        ({"x-api-key": "two"}, 200),
        ({"authorization": "Bearer onetwo"}, 401),
        ({"authorization": "Basic one"}, 401),
        ({"authorization": "Bearer"}, 401),
        ({"x-api-key": "öne"}, 401),
    ],
)
def test_a_key_opens_what_is_the_models(headers: dict[str, str], code: int) -> None:
    access = Access(keys=["one", "two"])
    assert status(access, OURS | headers)[0] == code
    assert status(access, OURS | headers, "/health")[0] == 200
    assert status(access, OURS | headers, "/page/../v1/models")[0] == 200, "no such path is the model's"


def test_every_answer_forbids_what_a_page_could_do_with_it() -> None:
    for path in ("/", "/v1/models"):
        headers = status(Access(keys=["one"]), OURS, path)[1]
        assert headers["content-security-policy"].startswith("default-src 'none'; ")
        assert headers["x-content-type-options"] == "nosniff"
