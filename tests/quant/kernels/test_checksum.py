import random

import pytest

from quant.kernels.checksum import checksums

# From the specification's own implementation.
KNOWN = {b"a": 0xD24EC4F1A98C6E5B, b"abc": 0x44BC2CF5AD770999}


@pytest.mark.parametrize("text", KNOWN)
def test_checksums_are_those_of_the_specification(text: bytes) -> None:
    assert checksums([memoryview(bytearray(text))]) == [KNOWN[text]]


def test_a_bit_that_changed_anywhere_changes_the_sum() -> None:
    chance = random.Random(1)
    for size in (1, 3, 4, 7, 8, 31, 32, 33, 63, 64, 95, 4096 + 5):
        data = bytearray(chance.randbytes(size))
        (before,) = checksums([memoryview(data)])
        for place in range(min(size, 100)):
            data[place] ^= 1 << chance.randrange(8)
            (after,) = checksums([memoryview(data)])
            assert after != before
            before = after
