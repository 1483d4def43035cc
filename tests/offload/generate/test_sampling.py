"""Settings at their ends, and stop strings wherever the tokens that spell them are cut."""

import math
import random
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from offload.generate.sampling import AnswerPenalty, Sampler, TextStream
from offload.records import Sampling
from quant.errors import CheckpointError, UsageError
from tests.tokenizers import KINDS, SPECIAL, byte_level, metaspace_bytes


@pytest.mark.parametrize(
    "asked",
    [
        {"max_tokens": 0},
        {"max_tokens": -3},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": math.nan},
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"min_p": math.nan},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1e-40},
        {"repetition_penalty": math.inf},
        {"repetition_penalty": math.nan},
        {"seed": -1},
        {"seed": 2**64},
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_by_name(asked: dict[str, Any]) -> None:
    [name] = asked
    with pytest.raises(UsageError, match=f"{name} is .*: expected "):
        Sampling(**asked)


EXTREME = [
    {"temperature": 5e-324},
    {"temperature": 1e-45},
    {"temperature": 1e-30},
    {"temperature": 1e308},
    {"temperature": 1.0, "top_p": 5e-324},
    {"temperature": 1.0, "top_k": 10**30},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 1.0, "repetition_penalty": 100},
    {"temperature": 1.0, "repetition_penalty": 0.01, "seed": 2**64 - 1},
    {"repetition_penalty": 100},
]


@pytest.mark.parametrize("asked", EXTREME, ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e4, 1e30])
def test_what_can_be_gives_a_token(asked: dict[str, Any], scale: float) -> None:
    logits = torch.linspace(-1, 1, 50)[torch.randperm(50, generator=torch.Generator().manual_seed(0))] * scale
    sampler = Sampler(Sampling(**asked))
    found = {sampler.pick(logits, [1, 2, 3]) for _ in range(20)}
    assert found <= set(range(50))
    if asked["temperature" if "temperature" in asked else "repetition_penalty"] < 1e-29 and scale >= 1:
        assert found == {int(logits.argmax())}


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_said(broken: float, temperature: float) -> None:
    logits = torch.zeros(9)
    logits[4] = broken
    with pytest.raises(CheckpointError, match="logits are not numbers"):
        Sampler(Sampling(temperature=temperature)).pick(logits, [1])


def streamed(tokenizer: PreTrainedTokenizerFast, ids: list[int], stop: list[str]) -> tuple[str, int | None]:
    """The text of ``ids`` up to a stop string, and at which token it was met."""
    stream, pieces = TextStream(tokenizer, stop), []
    for place, token in enumerate(ids):
        new, stopped = stream.push(token)
        pieces.append(new)
        if stopped:
            return "".join(pieces), place
    return "".join(pieces) + stream.finish(), None


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_ends_before_the_first_stop_string_at_the_token_that_completes_it(kind: str) -> None:
    tokenizer = KINDS[kind]()
    chance = random.Random(kind)
    met = 0
    for _ in range(150):
        ids = [chance.randrange(len(tokenizer)) for _ in range(chance.randint(1, 30))]
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        cuts = [chance.randrange(len(whole) or 1) for _ in range(2)]
        stop = [found for cut in cuts if (found := whole[cut : cut + chance.randint(1, 8)])]
        text, place = streamed(tokenizer, ids, stop)
        if place is None:
            assert text == whole and not any(found in whole for found in stop)
            continue
        met += 1
        seen = tokenizer.decode(ids[: place + 1], skip_special_tokens=True)
        before = tokenizer.decode(ids[:place], skip_special_tokens=True)
        assert text == seen[: min(seen.index(found) for found in stop if found in seen)]
        assert not any(found in before for found in stop), "it could have ended earlier"
    assert met > 20


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("kind", KINDS)
def test_a_special_token_stops_and_is_not_shown(kind: str, special: str) -> None:
    tokenizer = KINDS[kind]()
    text = list(range(len(tokenizer) - len(SPECIAL)))[-12:]
    stop = tokenizer.convert_tokens_to_ids(special)
    assert streamed(tokenizer, [*text, stop, *text], ["never", special]) == (tokenizer.decode(text), len(text))


def test_other_special_tokens_neither_stop_nor_show() -> None:
    tokenizer = byte_level()
    the = tokenizer.convert_tokens_to_ids("Ġthe")
    ids = [the, tokenizer.convert_tokens_to_ids("<|eot|>"), the]
    assert streamed(tokenizer, ids, ["<|im_end|>"]) == (" the the", None)


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("<|im_end|>", " the one"),
        ("one<|im_end|>", " the "),
        ("<|im_end|>.", " the one"),
        (" one<|im_end|>.<|eot|>", " the"),
        ("<|eot|>", " the one."),
        ("<|im_end|><|eot|>", " the one. the"),
        ("im_end", " the one. the"),
    ],
)
def test_a_stop_string_may_be_text_and_special_tokens_in_any_order(stop: str, text: str) -> None:
    tokenizer = byte_level()
    words = ["Ġthe", "Ġone", "<|im_end|>", ".", "<|eot|>", "Ġthe"]
    ids = [tokenizer.convert_tokens_to_ids(word) for word in words]
    found, place = streamed(tokenizer, ids, [stop])
    assert found == text
    assert (place is None) == (text == " the one. the")


def test_what_looks_like_a_special_token_but_is_spelled_out_stops_too() -> None:
    tokenizer = byte_level(tuple(bytes([byte]) for byte in dict.fromkeys(b"<|eot> ok")))
    ids = [tokenizer.convert_tokens_to_ids(character) for character in "ok<|eot|>ok"]
    assert streamed(tokenizer, ids, ["<|eot|>"])[0] == "ok"


def test_a_byte_token_stops_at_once() -> None:
    tokenizer = metaspace_bytes()
    ids = tokenizer.convert_tokens_to_ids(["▁the", "<0x0A>", "<0x0A>", "▁the"])
    assert streamed(tokenizer, ids, ["\n\n"]) == ("the", 2)


def test_answer_penalties_take_off_what_openai_documents() -> None:
    """https://platform.openai.com/docs/guides/text-generation: mu[j] - c[j] * frequency - (c[j] > 0) * presence."""
    penalty = AnswerPenalty(presence=0.5, frequency=0.25)
    scores = torch.zeros(1, 6)
    assert torch.equal(penalty(torch.tensor([[3, 4]]), scores), scores), "a prompt is not penalized"
    found = penalty(torch.tensor([[3, 4, 1, 1, 2]]), scores)
    assert found[0].tolist() == [0, -1.0, -0.75, 0, 0, 0]


def test_penalties_and_biases_change_what_is_chosen() -> None:
    logits = torch.tensor([0.0, 1.0, 1.4, 0.5])
    sampler = Sampler(Sampling(presence_penalty=0.3, frequency_penalty=0.2))
    context, chosen = [2], []
    for _ in range(4):
        chosen.append(sampler.pick(logits, context))
        context.append(chosen[-1])
    assert chosen == [2, 1, 2, 2]
    assert Sampler(Sampling(logit_bias={3: 2.0, 0: -100.0})).pick(logits, [0]) == 3
    assert Sampler(Sampling(logit_bias={2: -100.0})).pick(logits, [0]) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logprobs_are_the_models_own_whatever_sampling_does(temperature: float) -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 3
    sampler = Sampler(Sampling(temperature=temperature, top_k=3, logit_bias={7: 100.0}, logprobs=5, seed=1))
    token = sampler.pick(logits, [1])
    own = torch.log_softmax(logits, -1)
    assert token == 7 and sampler.logprobs is not None
    assert sampler.logprobs.chosen == pytest.approx(float(own[7]))
    assert [token for token, _ in sampler.logprobs.top] == own.argsort(descending=True)[:5].tolist()
    assert [value for _, value in sampler.logprobs.top] == pytest.approx(own.sort(descending=True).values[:5].tolist())


def test_special_tokens_are_shown_where_that_is_asked_for() -> None:
    tokenizer = byte_level()
    ids = [tokenizer.convert_tokens_to_ids(word) for word in ("Ġthe", "<|im_end|>", "Ġone", "<|eot|>", "Ġthe")]
    stream = TextStream(tokenizer, ["<|eot|>"], special_tokens=True)
    assert [stream.push(token) for token in ids[:4]][-1] == ("", True)
    assert stream.met == "<|eot|>"
    stream = TextStream(tokenizer, [], special_tokens=True)
    assert "".join(stream.push(token)[0] for token in ids) + stream.finish() == " the<|im_end|> one<|eot|> the"
