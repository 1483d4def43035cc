"""/v1/chat/completions by OpenAI's own client, beside what the session itself generates."""

import json
import time

import openai
import pytest

from tests.cli.serve.running import Running

ASK = [{"role": "user", "content": "def main"}]


def test_an_answer_is_what_generate_gives(client: openai.OpenAI, model, capfd) -> None:  # type: ignore[no-untyped-def]
    from tests.commands import invoke

    done = client.chat.completions.create(model="any", messages=ASK, max_tokens=24, temperature=0)
    said = json.loads(invoke("generate", model, "def main", "--chat", "-n", "24", "--json", "--context", "512").stdout)
    [choice] = done.choices
    assert choice.message.content == said["text"]
    assert choice.finish_reason == {"stop": "stop"}.get(said["finish_reason"], "length")
    assert done.usage is not None and done.usage.prompt_tokens == said["prompt_tokens"]
    assert done.usage.completion_tokens == 24
    assert done.model == model.name and done.id.startswith("chatcmpl-") and abs(done.created - time.time()) < 100


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_adds_up_to_the_whole(client: openai.OpenAI, usage: bool) -> None:
    asked = {"model": "any", "messages": ASK, "max_tokens": 20, "temperature": 0.8, "seed": 7}
    whole = client.chat.completions.create(**asked)  # type: ignore[call-overload]
    options = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = list(client.chat.completions.create(**asked, **options, stream=True))  # type: ignore[call-overload]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert len(chunks) > 3 + usage, "it comes in pieces, each of the tokens that were there at once"
    ends = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert ends[-1] == whole.choices[0].finish_reason and set(ends[:-1]) == {None}
    assert chunks[0].choices[0].delta.role == "assistant"
    if usage:
        assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    else:
        assert all(chunk.usage is None for chunk in chunks)


def test_a_seed_repeats_and_n_answers_differ(client: openai.OpenAI) -> None:
    asked = {"model": "any", "messages": ASK, "max_tokens": 12, "temperature": 1.5, "seed": 3, "n": 3}
    first, again = (client.chat.completions.create(**asked) for _ in range(2))  # type: ignore[call-overload]
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) == 3 and [choice.index for choice in first.choices] == [0, 1, 2]
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**asked, stream=True):  # type: ignore[call-overload]
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_what_the_cache_holds_of_a_conversation_is_told(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "import os, sys, json, re, time, math, random " * 4}]
    said = client.chat.completions.create(model="any", messages=messages, max_tokens=4, temperature=0)  # type: ignore[arg-type]
    messages += [
        {"role": "assistant", "content": str(said.choices[0].message.content)},
        {"role": "user", "content": "go on"},
    ]
    more = client.chat.completions.create(model="any", messages=messages, max_tokens=4, temperature=0)  # type: ignore[arg-type]
    assert more.usage is not None and said.usage is not None and more.usage.prompt_tokens_details is not None
    assert more.usage.prompt_tokens_details.cached_tokens == pytest.approx(said.usage.prompt_tokens, abs=6)
    timings = more.model_extra["timings"]  # type: ignore[index]
    assert timings["prompt_n"] == more.usage.prompt_tokens - more.usage.prompt_tokens_details.cached_tokens
    assert timings["predicted_per_second"] > 0


def test_stop_strings_end_a_text_and_are_not_in_it(client: openai.OpenAI) -> None:
    asked = {"model": "any", "messages": ASK, "max_tokens": 40, "temperature": 0}
    whole = client.chat.completions.create(**asked).choices[0].message.content  # type: ignore[call-overload]
    stop = whole[8:11]
    cut = client.chat.completions.create(**asked, stop=[stop, "never"]).choices[0]  # type: ignore[call-overload]
    assert cut.message.content == whole[: whole.index(stop)] and cut.finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_those_of_each_token(client: openai.OpenAI, stream: bool) -> None:
    asked = {"model": "any", "messages": ASK, "max_tokens": 6, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    if stream:
        chunks = list(client.chat.completions.create(**asked, stream=True))  # type: ignore[call-overload]
        found = [one for c in chunks if c.choices[0].logprobs for one in c.choices[0].logprobs.content]
        text = "".join(c.choices[0].delta.content or "" for c in chunks)
    else:
        [choice] = client.chat.completions.create(**asked).choices  # type: ignore[call-overload]
        found, text = choice.logprobs.content, choice.message.content
    assert "".join(one.token for one in found) == text and len(found) == 6
    for one in found:
        assert one.logprob == max(top.logprob for top in one.top_logprobs) <= 0
        assert len(one.top_logprobs) == 3 and bytes(one.bytes).decode() == one.token


def test_penalties_and_biases_reach_the_sampler(client: openai.OpenAI) -> None:
    asked = {"model": "any", "messages": ASK, "max_tokens": 30, "temperature": 0}
    plain = client.chat.completions.create(**asked).choices[0].message.content  # type: ignore[call-overload]
    other = client.chat.completions.create(**asked, frequency_penalty=2, presence_penalty=2)  # type: ignore[call-overload]
    assert other.choices[0].message.content != plain
    forced = client.chat.completions.create(**asked, logit_bias={"300": 100}, logprobs=True)  # type: ignore[call-overload]
    assert len({one.token for one in forced.choices[0].logprobs.content}) == 1


def test_the_model_is_listed_with_its_context(client: openai.OpenAI, server: Running) -> None:
    [model] = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id
    assert model.model_extra["context_length"] == 512  # type: ignore[index]
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-9'"):
        client.models.retrieve("gpt-9")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "role 'nobody'"),
        ({"temperature": -1}, "temperature is -1: expected 0 for greedy"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"top_p": 7}, "top_p is 7:"),
        ({"n": 99}, "99 answers"),
        ({"logit_bias": {"99999": 1}}, "beyond 4,095"),
        ({"messages": [{"role": "user", "content": "word " * 2000}]}, "the KV cache is planned for 512"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y"}}]}]},
            "takes text only",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "Unicode"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_is_refused_in_openais_words(server: Running, asked: dict[str, object], said: str) -> None:
    body = {"model": "any", "messages": ASK, "max_tokens": 4, **asked}
    status, _, document = server.ask("POST", "/v1/chat/completions", body)
    assert status == 400 and said in document["error"]["message"]
    assert document["error"]["type"] == "invalid_request_error" and document["error"].keys() >= {"param", "code"}


def test_keys_that_nobody_knows_are_named_in_the_answer(server: Running) -> None:
    body = {"messages": ASK, "max_tokens": 1, "store": True, "service_tier": "auto"}
    status, headers, _ = server.ask("POST", "/v1/chat/completions", body)
    assert status == 200 and headers["x-ignored-parameters"] == "service_tier,store"
