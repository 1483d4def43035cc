"""Tools and JSON by a schema, by OpenAI's client: a model of nonsense, held to a grammar, calls what it must."""

import json
from typing import Any

import jsonschema
import openai
import pytest

from tests.cli.serve.running import Running

ASK: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
PLACE = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "description": "Of a city", "parameters": PLACE}}
TIME: Any = {
    "type": "function",
    "function": {"name": "time", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
}
NAMED: Any = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize("seed", range(3))
def test_a_tool_that_must_be_called_is_called_with_valid_arguments(client: openai.OpenAI, seed: int) -> None:
    done = client.chat.completions.create(
        model="any",
        messages=ASK,
        tools=[TIME, WEATHER],
        tool_choice=NAMED,
        temperature=1,
        seed=seed,
        max_tokens=200,
        parallel_tool_calls=False,
    )
    [choice] = done.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    [call] = choice.message.tool_calls or []
    assert call.type == "function" and call.function.name == "weather"
    jsonschema.validate(json.loads(call.function.arguments), PLACE)


def test_a_call_is_streamed_with_its_index_and_id(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="any",
            messages=ASK,
            tools=[WEATHER],
            tool_choice="required",
            parallel_tool_calls=False,
            temperature=1,
            seed=5,
            max_tokens=200,
            stream=True,
        )
    )
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert deltas[0].id and {delta.index for delta in deltas} == {0}
    assert len(deltas) > 2 and not any(delta.id for delta in deltas[1:]), "its arguments come in pieces"
    assert "".join(delta.function.name or "" for delta in deltas if delta.function) == "weather"
    arguments = "".join(delta.function.arguments or "" for delta in deltas if delta.function)
    jsonschema.validate(json.loads(arguments), PLACE)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_conversation_with_calls_and_results_goes_on(client: openai.OpenAI) -> None:
    asked: Any = {"model": "any", "tools": [TIME], "temperature": 0}
    first = client.chat.completions.create(messages=ASK, tool_choice="required", parallel_tool_calls=False, **asked)
    message = first.choices[0].message
    assert message.tool_calls is not None and message.tool_calls[0].type == "function"
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "noon"}
    called = message.model_dump(exclude_none=True)
    more = client.chat.completions.create(messages=[*ASK, called, result], max_tokens=8, **asked)
    assert first.usage is not None and more.usage is not None and more.usage.prompt_tokens_details is not None
    assert more.usage.prompt_tokens > first.usage.prompt_tokens + 10
    assert more.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 1


def test_json_by_a_schema_is_valid(client: openai.OpenAI) -> None:
    for seed in range(4):
        done = client.chat.completions.create(
            model="any",
            messages=ASK,
            temperature=1,
            seed=seed,
            max_tokens=200,
            response_format={"type": "json_schema", "json_schema": {"name": "place", "strict": True, "schema": PLACE}},
        )
        assert done.choices[0].finish_reason == "stop"
        jsonschema.validate(json.loads(done.choices[0].message.content or ""), PLACE)


def test_json_without_a_schema_is_an_object(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(
        model="any",
        messages=ASK,
        temperature=0,
        max_tokens=150,
        response_format={"type": "json_object"},
        logit_bias={"92": 3, "34": 2},
    )
    text = done.choices[0].message.content or ""
    assert text.startswith("{")
    if done.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


SCHEMA_OF = {"type": "json_schema", "json_schema": {"name": "x", "schema": PLACE}}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"tool_choice": "required"}, "none is given"),
        ({"tools": [TIME], "tool_choice": NAMED}, "names 'weather'"),
        ({"tools": [TIME, TIME]}, "two tools have one name"),
        ({"tools": [WEATHER], "tool_choice": "required", "response_format": SCHEMA_OF}, "cannot be both"),
        ({"response_format": {"type": "json_schema"}}, "none is given"),
        ({"response_format": {"type": "xml"}}, "response_format.type: "),
        ({"response_format": {**SCHEMA_OF, "json_schema": {"name": "x", "schema": {"type": "??"}}}}, "grammar cannot"),
        (
            {"response_format": {**SCHEMA_OF, "json_schema": {"name": "x", "schema": {"enum": ["y" * 70000]}}}},
            "at most",
        ),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name: "),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "x", "arguments": "{"}}]}]},
            "no call",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_asked_of_tools_is_refused(server: Running, asked: dict[str, Any], said: str) -> None:
    status, _, document = server.ask("POST", "/v1/chat/completions", {"messages": ASK, "max_tokens": 4, **asked})
    assert status == 400 and said in document["error"]["message"], document
