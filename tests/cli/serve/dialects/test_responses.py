"""/v1/responses by OpenAI's own client."""

import json
from typing import Any

import jsonschema
import openai
import pytest

from tests.cli.serve.test_tools import PLACE

ASK: Any = {"model": "any", "input": "def main", "max_output_tokens": 12, "temperature": 0}
WEATHER: Any = {"type": "function", "name": "weather", "parameters": PLACE, "strict": True}
FORCED: Any = {"type": "function", "name": "weather"}


def test_an_answer_is_the_chats(client: openai.OpenAI) -> None:
    done = client.responses.create(**ASK, instructions="You write Python.")
    talk: Any = [{"role": "system", "content": "You write Python."}, {"role": "user", "content": "def main"}]
    same = client.chat.completions.create(model="any", messages=talk, max_tokens=12, temperature=0)
    assert done.output_text == same.choices[0].message.content and same.usage is not None
    assert done.usage is not None and done.usage.input_tokens == same.usage.prompt_tokens
    assert done.status == "incomplete" and done.incomplete_details is not None


def test_a_stream_has_every_event_in_its_order(client: openai.OpenAI) -> None:
    whole = client.responses.create(**ASK)
    events: Any = list(client.responses.create(**ASK, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert "".join(event.delta for event in events[4:-4]) == whole.output_text == events[-1].response.output_text


@pytest.mark.parametrize("stream", [False, True])
def test_a_function_is_called_and_its_output_goes_back(client: openai.OpenAI, stream: bool) -> None:
    asked: Any = {**ASK, "max_output_tokens": 200, "tools": [WEATHER], "tool_choice": FORCED}
    asked["parallel_tool_calls"] = False
    if stream:
        events: Any = list(client.responses.create(**asked, stream=True))
        done = events[-1].response
        [arguments] = [event.arguments for event in events if event.type == "response.function_call_arguments.done"]
    else:
        done = client.responses.create(**asked)
        arguments = done.output[0].arguments
    [call] = done.output
    assert (call.type, call.name, done.status) == ("function_call", "weather", "completed")
    jsonschema.validate(json.loads(arguments), PLACE)
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    talk = [{"role": "user", "content": "def main"}, call.model_dump(), output]
    assert client.responses.create(**{**ASK, "input": talk}).output_text


def test_json_by_a_schema(client: openai.OpenAI) -> None:
    wanted: Any = {"format": {"type": "json_schema", "name": "place", "schema": PLACE}}
    done = client.responses.create(**{**ASK, "max_output_tokens": 200}, text=wanted)
    jsonschema.validate(json.loads(done.output_text), PLACE)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"previous_response_id": "resp_1"}, "needs a memory"),
        ({"tools": [{"type": "web_search"}]}, "run on a server"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "not known here"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]},
            "part of type 'input_file'",
        ),
    ],
)
def test_what_needs_a_memory_or_a_server_is_refused(client: openai.OpenAI, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said):
        client.responses.create(**{**ASK, **asked})
