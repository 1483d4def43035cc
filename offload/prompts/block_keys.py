"""BlockKeys: a name for each beginning of a text, block by block.

A key is a hash of the key before it and of the block's tokens, so it stands for all tokens up to the block's end: two
texts share keys as far as they begin alike. Tokens of images have ids that mean something in one session only; what
they show is hashed instead.
"""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from quant.sizes import KV_PAGE_TOKENS

Content = Callable[[int], tuple[bytes, int]]


class BlockKeys:
    """The keys of one text that grows. ``origin`` is hashed into all of them. Ids from ``vocabulary`` on are rows of
    images: ``content`` says of which, by a hash of its pixels, and the row's number."""

    def __init__(self, origin: str, vocabulary: int, content: Content) -> None:
        self._origin, self._vocabulary, self._content = origin, vocabulary, content
        self.keys: list[str] = []  # of whole blocks

    def follow(self, tokens: Sequence[int]) -> list[str]:
        """The keys of all whole blocks of ``tokens``, which begin with those that were followed before."""
        for block in range(len(self.keys), len(tokens) // KV_PAGE_TOKENS):
            self.keys.append(self.after(block, tokens[block * KV_PAGE_TOKENS : (block + 1) * KV_PAGE_TOKENS]))
        return self.keys

    def after(self, block: int, tokens: Sequence[int]) -> str:
        """The key of the first ``block`` blocks and ``tokens`` after them, fewer than a block's maybe."""
        before = self.keys[block - 1] if block else self._origin
        ids = np.asarray(tokens, dtype="<i8")
        images = b""
        for place in np.flatnonzero(ids >= self._vocabulary):
            digest, row = self._content(int(ids[place]))
            ids[place] = -1 - row
            images += digest
        return hashlib.sha256(f"{before} {len(ids)} ".encode() + ids.tobytes() + images).hexdigest()[:32]
