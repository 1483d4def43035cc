"""What is told beside answers: tokens, properties, slots, counters."""

import threading
import time
from pathlib import Path

import openai
import pytest
from transformers import AutoTokenizer

from tests.cli.serve.running import KEY, Running


def test_tokens_go_both_ways_as_the_tokenizer_has_them(server: Running, model: Path) -> None:
    tokenizer, text = AutoTokenizer.from_pretrained(model), "größer 字 <|eot|>\n"
    _, _, plain = server.ask("POST", "/tokenize", {"content": text})
    assert plain["tokens"] == tokenizer.encode(text, add_special_tokens=False)
    _, _, whole = server.ask("POST", "/tokenize", {"content": text, "add_special": True, "with_pieces": True})
    assert [one["id"] for one in whole["tokens"]] == tokenizer.encode(text)
    assert server.ask("POST", "/detokenize", plain)[2]["content"] == text
    assert server.ask("POST", "/detokenize", {"tokens": [999_999]})[0] == 400


def test_properties_are_the_models(server: Running, model: Path) -> None:
    _, _, props = server.ask("GET", "/props")
    assert props["default_generation_settings"]["n_ctx"] == 512 and props["model_alias"] == model.name
    assert "<|header_start|>" in props["chat_template"] and props["total_slots"] == 16


def test_it_is_described(server: Running) -> None:
    assert server.ask("GET", "/openapi.json")[2]["paths"].keys() >= {"/v1/messages", "/live"}
    assert server.ask("GET", "/live")[0] == server.ask("GET", "/health")[0] == 200


def test_an_answer_under_way_has_a_slot_until_nobody_listens(server: Running, client: openai.OpenAI) -> None:
    made = client.chat.completions.create(
        model="any", messages=[{"role": "user", "content": "x"}], stream=True, max_tokens=400, logit_bias={"1": -100}
    )
    next(iter(made))
    threading.Event().wait(0.05)
    slots = server.ask("GET", "/slots")[2]
    made.response.close()
    end = time.monotonic() + 10
    while server.ask("GET", "/slots")[2]:
        assert time.monotonic() < end, "the slot is not given back"
        time.sleep(0.02)
    assert len(slots) <= 1 and all(slot["n_prompt_tokens"] > 0 for slot in slots)


def test_counters_add_up(server: Running, client: openai.OpenAI) -> None:
    def counted() -> dict[str, float]:
        lines = server.ask("GET", "/metrics")[2].splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    before = counted()
    done = client.chat.completions.create(model="any", messages=[{"role": "user", "content": "x y z"}], max_tokens=9)
    after = counted()
    assert done.usage is not None
    change = {name: after[name] - before.get(name, 0.0) for name in after}
    assert change["coldstream_generated_tokens_total"] == done.usage.completion_tokens
    prompt = change["coldstream_prompt_tokens_total"] + change["coldstream_cached_prompt_tokens_total"]
    assert prompt == done.usage.prompt_tokens
    assert change["coldstream_time_to_first_token_seconds_count"] == 1
    assert change['coldstream_read_bytes_total{tier="ram"}'] > 0
    assert change['coldstream_answers_finished_total{reason="length"}'] == 1


@pytest.mark.parametrize("path", ["/v1/nothing", "/nothing", "/v1/messages/nothing"])
def test_paths_that_are_none_are_said_in_the_dialects_words(server: Running, path: str) -> None:
    status, _, document = server.ask("GET", path)
    assert status == 404 and path in document["error"]["message"]
    assert server.ask("GET", "/v1/chat/completions")[0] == 405
    assert server.ask("GET", path, headers={"Authorization": f"Bearer {KEY}x"})[0] == 401
