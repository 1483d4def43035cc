"""Random bytes and numbers at memory speed: one block of each is made, and every tensor is a window into it.

A block's length is a prime number of 64-byte lines, so that rows of a weight never meet the same bytes again
at a row's start before the block has been gone through as often as it has lines.
"""

from collections.abc import Iterator
from functools import cache
from zlib import crc32

import torch
from torch import Tensor

from quant.scheme import Kind

LINE = 64
_LINES = 262_139  # the largest prime below 2^18: 16 MiB


class Noise:
    """Blocks of random data for one seed. ``key`` picks the window a tensor begins at."""

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._blocks: dict[tuple[str, float, float], Tensor] = {}

    def octets(self, key: str, kind: Kind, start: int, count: int) -> Iterator[Tensor]:
        """``count`` bytes of stored values, uint8, from byte ``start`` of tensor ``key`` on, in pieces.

        The values of int4 and int8 have mean zero: the lowest, which has no counterpart, is replaced by zero.
        A mean of -1/2 would add up over thousands of inputs and drive every token's hidden state the same
        way.
        """
        return self._window(self._block(f"octets {kind}", 0, 0), key, start, count)

    def uniform(self, key: str, low: float, high: float, dtype: torch.dtype, count: int) -> Iterator[Tensor]:
        """``count`` numbers between ``low`` and ``high`` in pieces, bf16 or f32."""
        return self._window(self._block(f"uniform {dtype}", low, high, dtype), key, 0, count)

    def normal(self, key: str, std: float, start: int, count: int) -> Iterator[Tensor]:
        """``count`` bf16 numbers of standard deviation ``std`` from number ``start`` of tensor ``key`` on."""
        return self._window(self._block("normal", 0, std, torch.bfloat16), key, start, count)

    def generator(self, key: str) -> torch.Generator:
        """A generator of its own for ``key``."""
        return torch.Generator().manual_seed(self._seed * 2**32 + crc32(key.encode()))

    def _block(self, kind: str, low: float, high: float, dtype: torch.dtype = torch.uint8) -> Tensor:
        name = (kind, low, high)
        if name not in self._blocks:
            generator = self.generator(kind)
            if kind.startswith("octets"):
                words = torch.randint(
                    -(2**63), 2**63 - 1, (_LINES * LINE // 8,), dtype=torch.int64, generator=generator
                )
                self._blocks[name] = _centred(words.view(torch.uint8), kind)
            elif kind == "normal":
                block = torch.empty(_LINES * LINE // 2, dtype=torch.bfloat16)
                self._blocks[name] = block.normal_(0, high, generator=generator)
            else:  # scales: a quarter of the numbers is plenty
                small = torch.empty(_prime_below(_LINES // 4) * LINE // 2, dtype=torch.float32)
                self._blocks[name] = small.uniform_(low, high, generator=generator).to(dtype)
        return self._blocks[name]

    def _window(self, block: Tensor, key: str, start: int, count: int) -> Iterator[Tensor]:
        line = LINE // block.itemsize
        first = crc32(f"{self._seed} {key}".encode()) % (block.numel() // line) * line
        position = (first + start) % block.numel()
        while count:
            piece = block[position : position + count]
            yield piece
            count -= piece.numel()
            position = 0


def _centred(octets: Tensor, kind: str) -> Tensor:
    """Replace the stored value 0, the lowest, by the one that stands for zero."""
    if kind.endswith("int4"):
        octets |= (octets & 0x0F).eq(0).to(torch.uint8) << 3
        octets |= (octets & 0xF0).eq(0).to(torch.uint8) << 7
    elif kind.endswith("int8"):
        octets |= octets.eq(0).to(torch.uint8) << 7
    return octets


@cache
def _prime_below(limit: int) -> int:
    return next(n for n in range(limit, 1, -1) if all(n % d for d in range(2, int(n**0.5) + 1)))
