"""Prompt lookup, held against a search through the whole text."""

import random

from offload.batch.ngram import NgramIndex


def test_the_longest_match_is_followed() -> None:
    """Against a search through the whole text."""
    chance = random.Random(3)
    for alphabet in (2, 3, 12):
        index, text = NgramIndex(), list[int]()
        for _ in range(300):
            text.append(chance.randrange(alphabet))
            if chance.random() < 0.1 and len(text) > 20:
                start = chance.randrange(len(text) - 10)
                text += text[start : start + 10]
            index.extend(text)
            found = index.propose(4)
            length = found.evidence[0] if found.tokens else 1
            longest = _longest(text)
            assert length == longest if alphabet == 12 else length <= longest
            if found.tokens:
                suffix = text[-length:]
                places = [i for i in range(length, len(text)) if text[i - length : i] == suffix]
                assert found.tokens[0] in {text[place] for place in places}
    index = NgramIndex()
    index.extend([1, 2, 3, 1, 2])
    assert index.propose(6).tokens == [3, 1, 2, 3, 1, 2]
    index.extend([1, 2, 3, 1, 2, 9])
    assert index.propose(3).tokens == []


def _longest(text: list[int]) -> int:
    best = 1
    for place in range(1, len(text)):
        length = 0
        while length < 32 and length < place and text[place - 1 - length] == text[-1 - length]:
            length += 1
        best = max(best, length)
    return best
