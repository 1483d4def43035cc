"""/v1/messages by Anthropic's own client."""

import json
from typing import Any

import anthropic
import jsonschema
import pytest

from tests.cli.serve.running import Running
from tests.cli.serve.test_tools import PLACE

ASK: list[Any] = [{"role": "user", "content": "def main"}]
WEATHER: Any = {"name": "weather", "description": "Of a city", "input_schema": PLACE}
FORCED: Any = {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}


def test_an_answer_has_content_and_usage(claude: anthropic.Anthropic) -> None:
    done = claude.messages.create(
        model="any", max_tokens=12, messages=ASK, extra_body={"temperature": 0}, system="You write Python."
    )
    [block] = done.content
    assert block.type == "text" and block.text
    assert (done.stop_reason, done.role, done.type) == ("max_tokens", "assistant", "message")
    counted = claude.messages.count_tokens(model="any", messages=ASK, system="You write Python.")
    read = done.usage.cache_read_input_tokens or 0
    assert done.usage.input_tokens + read == counted.input_tokens and done.usage.output_tokens == 12


def test_a_stream_has_every_event_in_its_order(claude: anthropic.Anthropic) -> None:
    asked: Any = {"model": "any", "max_tokens": 10, "messages": ASK, "extra_body": {"temperature": 0}}
    whole = claude.messages.create(**asked)
    events = list(claude.messages.create(**asked, stream=True))
    kinds = [event.type for event in events]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    assert kinds[kinds.index("content_block_start") :].count("content_block_delta") > 1
    assert kinds.index("content_block_stop") > kinds.index("content_block_delta")
    with claude.messages.stream(**asked) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text  # type: ignore[union-attr]
    assert final.usage.output_tokens == whole.usage.output_tokens and final.stop_reason == whole.stop_reason


def test_a_stop_sequence_is_named(claude: anthropic.Anthropic) -> None:
    asked: Any = {"model": "any", "max_tokens": 40, "messages": ASK, "extra_body": {"temperature": 0}}
    text = claude.messages.create(**asked).content[0].text  # type: ignore[union-attr]
    cut = claude.messages.create(**asked, stop_sequences=["never", text[8:11]])
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", text[8:11])


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_used_with_valid_input(claude: anthropic.Anthropic, stream: bool) -> None:
    asked: Any = {"model": "any", "max_tokens": 200, "messages": ASK, "tools": [WEATHER], "tool_choice": FORCED}
    if stream:
        with claude.messages.stream(**asked) as made:
            pieces = [event for event in made if event.type == "input_json"]
            done = made.get_final_message()
        assert len(pieces) > 1, "the input comes in pieces"
    else:
        done = claude.messages.create(**asked)
    [block] = done.content
    assert block.type == "tool_use" and block.name == "weather" and block.id
    jsonschema.validate(block.input, PLACE)
    assert done.stop_reason == "tool_use"


def test_a_result_goes_back_and_tools_count(claude: anthropic.Anthropic) -> None:
    used = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Rome", "days": 2}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "sunny"}]}
    talk: Any = [*ASK, {"role": "assistant", "content": [used]}, {"role": "user", "content": [result]}]
    done = claude.messages.create(model="any", max_tokens=4, messages=talk, tools=[WEATHER])
    assert done.content
    few, more = (claude.messages.count_tokens(model="any", messages=ASK, **tools).input_tokens for tools in _TOOLS)
    assert more > few + 30


_TOOLS: list[dict[str, Any]] = [{}, {"tools": [WEATHER]}]


def test_a_line_of_accounts_that_changes_does_not_defeat_the_cache(claude: anthropic.Anthropic) -> None:
    read = []
    for number in range(2):
        system: Any = [
            {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1; cch={number:05};"},
            {"type": "text", "text": "You are careful, and say so at length, each and every time you are asked."},
        ]
        done = claude.messages.create(model="any", max_tokens=2, messages=ASK, system=system)
        read.append((done.usage.input_tokens, done.usage.cache_read_input_tokens))
    assert read[1][0] == 1 and read[1][1] == sum(read[0]) - 1


def test_json_by_a_schema(server: Running) -> None:
    body = {"model": "any", "max_tokens": 200, "messages": ASK}
    wanted = {"output_config": {"format": {"type": "json_schema", "schema": PLACE}}}
    status, _, document = server.ask("POST", "/v1/messages", {**body, **wanted})
    assert status == 200
    jsonschema.validate(json.loads(document["content"][0]["text"]), PLACE)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "part of type 'image' that is not taken",
        ),
        ({"messages": [{"role": "robot", "content": "x"}]}, "the role is 'robot'"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "no input_schema"),
        ({"tool_choice": {"type": "tool"}}, "names no tool"),
        ({"messages": "x"}, "messages: "),
    ],
    ids=lambda value: str(value)[:40],
)
def test_errors_have_anthropics_shape(claude: anthropic.Anthropic, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        claude.messages.create(**{"model": "any", "max_tokens": 4, "messages": ASK, **asked})  # type: ignore[call-overload]
    body: Any = caught.value.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert said in body["error"]["message"]


def test_an_answer_that_is_begun_is_gone_on_with(claude: anthropic.Anthropic) -> None:
    asked: Any = {"model": "any", "extra_body": {"temperature": 0}}
    whole = claude.messages.create(**asked, max_tokens=24, messages=ASK).content[0].text  # type: ignore[union-attr]
    begun = claude.messages.create(**asked, max_tokens=4, messages=ASK).content[0].text  # type: ignore[union-attr]
    turn: Any = [*ASK, {"role": "assistant", "content": [{"type": "text", "text": begun}]}]
    rest = claude.messages.create(**asked, max_tokens=20, messages=turn)
    assert begun and whole == begun + rest.content[0].text  # type: ignore[union-attr]
    counted = [claude.messages.count_tokens(model="any", messages=one).input_tokens for one in (ASK, turn)]
    assert counted[1] == counted[0] + 4
    with pytest.raises(anthropic.BadRequestError, match="free text only"):
        claude.messages.create(**asked, max_tokens=20, messages=turn, tools=[WEATHER], tool_choice=FORCED)


def test_the_model_is_listed_as_this_client_reads_it(claude: anthropic.Anthropic) -> None:
    [one] = claude.models.list()
    assert one.type == "model" and one.display_name == one.id and one.created_at.year > 2000
    assert claude.models.retrieve(one.id) == one
