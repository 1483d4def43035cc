"""/v1/completions by OpenAI's own client."""

import json
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.cli.serve.running import Running
from tests.commands import invoke

ASK: Any = {"model": "any", "prompt": "import ", "max_tokens": 16, "temperature": 0}


def test_a_text_goes_on_as_generate_has_it(client: openai.OpenAI, model: Path) -> None:
    done = client.completions.create(**ASK)
    said = json.loads(invoke("generate", model, "import ", "-n", "16", "--json", "--context", "512").stdout)
    assert done.choices[0].text == said["text"] and done.choices[0].finish_reason == "length"
    chunks = list(client.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == said["text"]
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 16


def test_prompts_are_texts_or_ids_one_or_several(client: openai.OpenAI, server: Running) -> None:
    _, _, ids = server.ask("POST", "/tokenize", {"content": "import ", "add_special": True})
    one = client.completions.create(**ASK).choices[0].text
    both = client.completions.create(**ASK | {"prompt": ["import ", "def "]})
    assert [choice.index for choice in both.choices] == [0, 1] and both.choices[0].text == one
    for prompt in (ids["tokens"], [ids["tokens"]]):
        assert client.completions.create(**ASK | {"prompt": prompt}).choices[0].text == one


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_lists(client: openai.OpenAI, stream: bool) -> None:
    made = client.completions.create(**ASK, logprobs=2, stream=stream)
    found = [chunk.choices[0].logprobs for chunk in made] if stream else [made.choices[0].logprobs]
    tokens = [token for one in found if one for token in one.tokens or []]
    offsets = [offset for one in found if one for offset in one.text_offset or []]
    assert "".join(tokens) == client.completions.create(**ASK).choices[0].text
    assert offsets == [len("".join(tokens[:place])) for place in range(16)]
    assert all(len(top) == 2 for one in found if one for top in one.top_logprobs or [])


@pytest.mark.parametrize("asked", [{"echo": True}, {"suffix": "x"}, {"best_of": 3}, {"prompt": []}, {"prompt": [[]]}])
def test_what_is_not_offered_is_refused(server: Running, asked: dict[str, Any]) -> None:
    status, _, document = server.ask("POST", "/v1/completions", ASK | asked)
    assert status == 400 and next(iter(asked)) in document["error"]["message"]
