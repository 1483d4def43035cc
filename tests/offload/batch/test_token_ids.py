"""A long text's tokens take four bytes each, and a step copies none but those that it runs."""

import tracemalloc

import numpy as np
import pytest

from offload.batch.prefixes import Prefixes
from offload.batch.token_ids import common, frozen, packed_ids
from offload.generate.sequence import Sequence
from offload.generate.stream import Stream
from offload.records import Sampling

MANY = 1_000_000


def test_a_sequence_and_what_is_left_of_it_take_four_bytes_a_token_each() -> None:
    prompt = list(range(300, 300 + MANY))
    kept: Prefixes[None] = Prefixes(lambda nothing: None)
    tracemalloc.start()
    sequence = Sequence(0, prompt, Sampling(), Stream(MANY, lambda stream: None), 10)
    held = tracemalloc.get_traced_memory()[0]
    kept.keep(sequence.tokens, None)
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 4.1 * MANY and after - held < 4.1 * MANY


def test_what_was_frozen_changes_no_more_and_lets_its_text_grow() -> None:
    text = packed_ids([1, 2, 3])
    before = frozen(text)
    text.append(4)
    assert before.tolist() == [1, 2, 3]
    assert common(before, frozen(text)) == 3 and common(before, frozen([1, 5])) == 1
    assert common(before, np.empty(0, np.int32)) == 0


def test_a_number_that_is_no_token_is_refused() -> None:
    for wrong in (2**31, 1.5, "1"):
        with pytest.raises((OverflowError, TypeError)):
            packed_ids([wrong])  # type: ignore[list-item]
