"""Stop strings, wherever the tokens that spell them are cut."""

import random

import pytest
from transformers import PreTrainedTokenizerFast

from offload.run.sampling import TextStream
from tests.tokenizers import KINDS, SPECIAL, byte_level, metaspace_bytes


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
