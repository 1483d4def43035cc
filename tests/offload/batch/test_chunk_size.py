"""Chunks beside others: half a second at most, whatever the machine, and none much shorter."""

import pytest

from offload.batch.chunk_size import ChunkSize


@pytest.mark.parametrize(
    ("read", "rate", "expected"), [(0.0, 10, 64), (0.1, 300, 64), (0.1, 800, 128), (0.1, 2000, 512), (0.0, 1e6, 2048)]
)
def test_chunks_take_half_a_second_at_most_and_a_quarter_at_least_if_they_can(
    read: float, rate: float, expected: int
) -> None:
    size, took, longest = ChunkSize(2048), 0.0, 0.0
    size.note(2048, read + 2048 / rate)  # one that nobody waited for
    for _ in range(20):
        took = read + size.beside / rate
        longest = max(longest, took)
        size.note(size.beside, took)
    assert size.beside == expected
    assert longest <= 0.5 or expected == 64
    assert took >= 0.25 or expected == 2048


def test_a_machine_that_becomes_slower_has_shorter_chunks_at_once() -> None:
    size = ChunkSize(2048)
    for _ in range(5):
        size.note(size.beside, size.beside / 5000)
    assert size.beside == 2048
    size.note(2048, 4.0)
    assert size.beside == 256


def test_what_is_left_of_a_prompt_makes_no_chunk_shorter() -> None:
    size = ChunkSize(2048)
    size.note(64, 0.1)
    size.note(128, 0.2)
    size.note(70, 0.45)  # it has read all weights for few tokens
    assert size.beside == 256


def test_chunks_are_never_longer_than_planned_and_short_ones_say_nothing() -> None:
    size = ChunkSize(96)
    size.note(63, 1e-3)
    assert size.beside == 64
    size.note(64, 1e-3)
    assert size.beside == 64
    small = ChunkSize(16)
    small.note(64, 1.0)
    assert small.beside == 16
