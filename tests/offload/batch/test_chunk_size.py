"""Chunks beside others: half a second of them, whatever the machine."""

import pytest

from offload.batch.chunk_size import ChunkSize


@pytest.mark.parametrize(("rate", "expected"), [(10, 64), (190, 64), (200, 128), (1100, 512), (1e6, 2048)])
def test_others_wait_half_a_second_or_for_64_tokens(rate: float, expected: int) -> None:
    size = ChunkSize(2048)
    size.note(256, 256 / rate)
    assert size.beside == expected


def test_chunks_are_never_longer_than_planned_and_short_ones_say_nothing() -> None:
    size = ChunkSize(96)
    assert size.beside == 96
    size.note(63, 1e-3)
    assert size.beside == 96
    size.note(96, 1e-3)
    assert size.beside == 64
    small = ChunkSize(16)
    small.note(64, 1.0)
    assert small.beside == 16
