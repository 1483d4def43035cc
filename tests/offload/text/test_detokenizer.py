"""Text in pieces is the text of the whole, for every kind of tokenizer.

``COLDSTREAM_STREAMS=10000`` runs that many random sequences per kind; the default is for every day.
"""

import os
import random
import time
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from offload.text.detokenizer import Detokenizer
from tests.tokenizers import KINDS, byte_characters, byte_level, metaspace_bytes

SEQUENCES = int(os.environ.get("COLDSTREAM_STREAMS", "300"))


@pytest.mark.parametrize("skip", [True, False], ids=["special tokens skipped", "special tokens shown"])
@pytest.mark.parametrize("cleanup", [True, False], ids=["cleaned up", "as it is"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_pieces_joined_are_the_decoded_whole(kind: str, cleanup: bool, skip: bool) -> None:
    forced = {"clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True} if cleanup else {}
    tokenizer = KINDS[kind](clean_up_tokenization_spaces=cleanup, **forced)
    chance = random.Random(f"{kind} {cleanup} {skip}")
    for _ in range(-(-SEQUENCES // 4)):
        ids = some_ids(len(tokenizer), chance)
        stream = Detokenizer(tokenizer, skip_special_tokens=skip)
        pieces = [stream.push(token) for token in ids]
        whole = tokenizer.decode(ids, skip_special_tokens=skip)
        assert "".join(pieces) + stream.pending() == whole, ids


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_held_back_completes_the_text_at_every_token(kind: str) -> None:
    tokenizer = KINDS[kind]()
    chance = random.Random(kind)
    for _ in range(20):
        ids = some_ids(len(tokenizer), chance)
        stream, given = Detokenizer(tokenizer), ""
        for count, token in enumerate(ids, start=1):
            given += stream.push(token)
            assert given + stream.pending() == tokenizer.decode(ids[:count], skip_special_tokens=True)


def test_a_character_comes_out_with_the_token_that_makes_it_certain() -> None:
    characters, tokenizer = byte_characters(), byte_level()
    words = ["".join(characters[byte] for byte in piece) for piece in (b"\xf0", b"\x9f\x98", b"\x80 y", b" the")]
    stream = Detokenizer(tokenizer)
    assert [stream.push(token) for token in tokenizer.convert_tokens_to_ids(words)] == ["", "", "😀 y", " the"]
    tokenizer = metaspace_bytes()
    ids = tokenizer.convert_tokens_to_ids(["<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "▁the"])
    stream = Detokenizer(tokenizer)
    assert [stream.push(token) for token in ids] == ["", "", "", "", "😀 the"]


class OwnDecoder(PreTrainedTokenizerFast):
    """A tokenizer class that decodes in a way of its own."""

    def _decode(self, *args: Any, **kwargs: Any) -> str:
        return super()._decode(*args, **kwargs).replace("e", "E")


def test_a_tokenizer_that_decodes_in_its_own_way_streams_too() -> None:
    tokenizer = OwnDecoder(tokenizer_object=byte_level().backend_tokenizer)
    chance = random.Random(7)
    for _ in range(50):
        ids = some_ids(len(tokenizer), chance)
        stream = Detokenizer(tokenizer)
        assert "".join(map(stream.push, ids)) + stream.pending() == tokenizer.decode(ids, skip_special_tokens=True)
    stream = Detokenizer(tokenizer)
    assert stream.push(tokenizer.convert_tokens_to_ids("Ġthe")) == " thE"


def test_a_token_costs_the_same_late_in_a_text_as_early() -> None:
    tokenizer = metaspace_bytes()
    words = tokenizer.convert_tokens_to_ids(["▁the", "<0xE5>", "<0xAD>", "<0x97>", "."])
    stream = Detokenizer(tokenizer)

    def seconds(count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            for token in words:
                stream.push(token)
        return time.perf_counter() - started

    seconds(500)
    early = min(seconds(500) for _ in range(3))
    seconds(20_000)
    assert min(seconds(500) for _ in range(3)) < 4 * early


def some_ids(count: int, chance: random.Random) -> list[int]:
    """A sequence in which, now and then, few tokens come again and again, and one beyond the vocabulary."""
    few = chance.sample(range(count), k=chance.choice([3, 8, count]))
    return [chance.choice(few) if chance.random() > 0.01 else count + 5 for _ in range(chance.randint(0, 60))]
