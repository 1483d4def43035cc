"""A prompt gets the tokens that its answers were made of, wherever it decodes to the same text with them."""

import random
from typing import Any

import pytest

from offload.text.own_tokens import OwnTokens
from tests.tokenizers import KINDS, SPECIAL, byte_level

WORDS = (b"the", b"\n\n", b" the", b"e ", "字".encode(), b"<|eot|>")
BYTES = tuple(bytes([byte]) for byte in range(256))
THE, TWO_LINES, SPACE_THE, E_SPACE, CHARACTER, SPELLED = range(256, 262)
MOST = 10_000
# Of these kinds many a text is encoded as itself, cut otherwise.
ROUND = ("byte-level BPE", "Metaspace with byte fallback", "Unigram with byte fallback", "Unigram, Metaspace")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Every text is encoded byte by byte; the words are what only a model says."""
    return byte_level(BYTES + WORDS)


def test_an_answer_that_a_tokenizer_cuts_otherwise_keeps_its_tokens(tokenizer: Any) -> None:
    start, end, eot = tokenizer.convert_tokens_to_ids(SPECIAL)
    own = OwnTokens(tokenizer)
    prompt = [start, 65, end, 66, eot, start, TWO_LINES]
    own.remember([*prompt, THE, SPACE_THE, CHARACTER, eot])
    given = ids(tokenizer, "<|im_start|>A<|im_end|>B<|eot|><|im_start|>\n\nthe the字<|eot|><|im_start|>more")
    first = [*prompt, THE, SPACE_THE, CHARACTER, eot, start, *b"more"]
    assert own.as_said(given, MOST) == first
    # And so on: of a text that begins with that one, both answers.
    own.remember([*first, THE, E_SPACE])
    again = ids(tokenizer, tokenizer.decode([*first, THE, E_SPACE, eot, 67]))
    assert own.as_said(again, MOST) == [*first, THE, E_SPACE, eot, 67]
    assert len(own._texts) == 1, "what another begins with is not kept beside it"


def test_what_a_template_trims_from_an_answer_is_left_out(tokenizer: Any) -> None:
    _, _, eot = tokenizer.convert_tokens_to_ids(SPECIAL)
    own = OwnTokens(tokenizer)
    own.remember([eot, 65, THE, 10, TWO_LINES, eot, 1])
    assert own.as_said([eot, 65, *b"the", eot, 66], MOST) == [eot, 65, THE, eot, 66]


def test_what_differs_as_a_text_is_as_the_tokenizer_has_it(tokenizer: Any) -> None:
    start, _, eot = tokenizer.convert_tokens_to_ids(SPECIAL)
    own = OwnTokens(tokenizer)
    own.remember([start, 65, THE, 66, eot])
    for text in (b"AtheC", b"Ath", b"AtheBBBBBBB", b"BtheB"):
        given = [start, *text, eot, 67]
        assert own.as_said(given, MOST) == given
    open_end = [start, *b"AtheB"]
    assert own.as_said(open_end, MOST) == open_end, "what follows would be cut otherwise"


def test_a_mark_that_a_model_spells_is_never_taken_for_the_special_token(tokenizer: Any) -> None:
    start, _, eot = tokenizer.convert_tokens_to_ids(SPECIAL)
    own = OwnTokens(tokenizer)
    own.remember([start, THE, SPELLED, THE, eot])
    given = ids(tokenizer, "<|im_start|>the<|eot|>the<|eot|>")
    assert given.count(eot) == 2
    assert own.as_said(given, MOST).count(eot) == 2


def test_bytes_that_are_no_character_are_not_taken_for_each_other(tokenizer: Any) -> None:
    start, _, eot = tokenizer.convert_tokens_to_ids(SPECIAL)
    own = OwnTokens(tokenizer)
    own.remember([start, THE, 0xF0, eot])
    given = [start, *b"the", *"\ufffd".encode(), eot]
    assert own.as_said(given, MOST) == given


def test_a_picture_is_not_taken_for_another_one(tokenizer: Any) -> None:
    start, _, eot = tokenizer.convert_tokens_to_ids(SPECIAL)
    first, other = len(tokenizer) + 7, len(tokenizer) + 8
    own = OwnTokens(tokenizer)
    own.remember([start, 65, first, first + 9, 66, eot, TWO_LINES, THE, eot])
    same = [start, 65, first, first + 9, 66, eot, 10, 10, *b"the", eot, 1]
    assert own.as_said(same, MOST) == [*same[:6], TWO_LINES, THE, eot, 1]
    for given in ([start, 65, other, other + 9, 66, eot, 1], [start, 65, 66, eot, 1], [start, 65, first, 66, eot, 1]):
        assert own.as_said(given, MOST) == given


def test_a_prompt_is_not_made_longer_than_there_is_room(tokenizer: Any) -> None:
    start, _, eot = tokenizer.convert_tokens_to_ids(SPECIAL)
    own = OwnTokens(tokenizer)
    own.remember([start, *b"the", eot])
    given = [start, THE, eot, 65]
    assert own.as_said(given, 5) == given
    assert own.as_said(given, 6) == [start, *b"the", eot, 65]


def test_of_many_texts_the_latest_are_kept(tokenizer: Any) -> None:
    start, _, eot = tokenizer.convert_tokens_to_ids(SPECIAL)
    own = OwnTokens(tokenizer)
    for number in range(65):
        own.remember([start, number, THE, eot])
    assert own.as_said([start, 0, *b"the", eot, 1], MOST) == [start, 0, *b"the", eot, 1]
    assert own.as_said([start, 1, *b"the", eot, 1], MOST) == [start, 1, THE, eot, 1]
    for _ in range(3):
        own.remember([eot, *range(64)] * 10_000)
    assert sum(map(len, own._texts)) <= 1 << 20


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_is_the_same_whatever_the_tokenizer(kind: str) -> None:
    tokenizer, chance = KINDS[kind](), random.Random(kind)
    special = tokenizer.convert_tokens_to_ids(SPECIAL)
    changed = 0
    for _ in range(150):
        own = OwnTokens(tokenizer)
        few = chance.sample(range(len(tokenizer)), 5)
        said = [chance.choice(special if chance.random() < 0.2 else few) for _ in range(chance.randint(2, 40))]
        own.remember(said)
        given = ids(tokenizer, text_of(tokenizer, said) + chance.choice(["", "<|eot|>", "<|eot|>a.", "b"]))
        found = own.as_said(given, MOST)
        assert text_of(tokenizer, found) == text_of(tokenizer, given)
        changed += found != given
    assert changed or kind not in ROUND, "hardly a text is encoded as itself"


def ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return found


def text_of(tokenizer: Any, tokens: list[int]) -> str:
    text: str = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
