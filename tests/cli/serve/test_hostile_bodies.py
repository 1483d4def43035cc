"""Bodies that no client should send: each is answered or refused in one line, and never fails the server."""

import json
from typing import Any

import pytest

from tests.cli.serve.running import Running

CHAT, PLAIN, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"
SAY = [{"role": "user", "content": "x"}]
LONE = "\ud800"  # half of a character, which JSON can say and UTF-8 cannot
VALUES: list[Any] = [0, -1, 10**30, 1e300, 0.5, True, "", "\0", LONE, [], [[]], {}]


def told(path: str, **body: Any) -> tuple[str, bytes]:
    return path, json.dumps({"messages": SAY, "max_tokens": 1} | body).encode()


def called(**call: Any) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": "x", **call}, *SAY]


def kinds(value: Any) -> list[tuple[str, bytes]]:
    """``value`` in the places where clients say something of their own."""
    function = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": value}}}}
    schema = {"type": "json_schema", "json_schema": {"schema": value}}
    return [
        *(told(CHAT, **{name: value}) for name in ("n", "seed", "stop", "top_k", "logit_bias", "tools", "max_tokens")),
        told(CHAT, messages=value),
        told(CHAT, messages=[value]),
        told(CHAT, messages=[{"role": value, "content": value}]),
        told(CHAT, messages=[{"role": "user", "content": [{"type": "image_url", "image_url": value}]}]),
        told(CHAT, messages=called(tool_calls=value)),
        told(CHAT, messages=called(tool_calls=[value])),
        told(CHAT, messages=called(tool_calls=[{"function": {"name": value, "arguments": json.dumps(value)}}])),
        told(CHAT, tools=[function], tool_choice="required"),
        told(CHAT, response_format=schema),
        told(CHAT, chat_template_kwargs={"messages": value, "self": value}),
        told(CHAT, **{LONE: value}),
        told(PLAIN, prompt=value),
        told(PLAIN, prompt=[value]),
        told(PLAIN, prompt=[[value]]),
        told(MESSAGES, messages=[{"role": "user", "content": [{"type": "tool_result", "content": value}]}]),
        told(MESSAGES, messages=called(content=[{"type": "tool_use", "name": value, "id": value, "input": value}])),
        told(MESSAGES, system=value),
        told("/v1/responses", input=[value], max_output_tokens=1),
        told("/v1/responses", input="x", text={"format": value}, max_output_tokens=1),
        told("/tokenize", content=value),
        told("/detokenize", tokens=[value]),
    ]


def deep(depth: int) -> list[tuple[str, bytes]]:
    lists, schemas = b"[" * depth + b"]" * depth, b'{"items":' * depth + b"{}" + b"}" * depth
    start = told(CHAT)[1][:-1]
    return [
        (CHAT, start + b', "zzz": ' + lists + b"}"),
        (CHAT, start + b', "chat_template_kwargs": {"a": ' + lists + b"}}"),
        (CHAT, start + b', "response_format": {"type": "json_schema", "json_schema": {"schema": ' + schemas + b"}}}"),
        (
            CHAT,
            start + b', "tools": [{"type": "function", "function": {"name": "f", "parameters": ' + schemas + b"}}]}",
        ),
    ]


BROKEN = [
    *(b"", b"null", b"{", b"NaN", b"\xff", b"\xef\xbb\xbf{}", b'{"n": 1e999}', b'{"seed": ' + b"9" * 5000 + b"}"),
    b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "temperature": -1e999}',
]


@pytest.mark.parametrize("kind", ["a value of another kind", "deep", "no JSON"])
def test_any_body_is_answered_or_refused_in_one_line(server: Running, kind: str) -> None:
    if kind == "a value of another kind":
        sent = [case for value in VALUES for case in kinds(value)]
    elif kind == "deep":
        sent = [case for depth in (90, 900, 90_000) for case in deep(depth)]
    else:
        sent = [(path, body) for path in (CHAT, PLAIN, MESSAGES, "/tokenize") for body in BROKEN]
    for path, body in sent:
        status, _, document = server.ask("POST", path, body)
        assert status in (200, 400), (status, path, body[:200], document)
        if status == 400:
            said = document["error"]["message"]
            assert said and "\n" not in said and len(said) < 1000, said
    assert not any("Traceback" in line for line in server.said)


def test_whole_numbers_are_taken_as_javascript_writes_them(server: Running) -> None:
    whole = server.ask("POST", "/detokenize", {"tokens": [5, 6]})[2]
    assert server.ask("POST", "/detokenize", b'{"tokens": [5.0, 6e0]}')[2] == whole


def test_a_token_beyond_the_vocabulary_is_the_clients_mistake(server: Running) -> None:
    for prompt in ([999_999], [[1], [10**30]]):
        status, _, document = server.ask("POST", PLAIN, {"prompt": prompt})
        assert (status, document["error"]["param"]) == (400, "prompt") and "beyond" in document["error"]["message"]
