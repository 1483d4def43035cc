"""Text cut into windows of tokens: what evaluation and calibration run."""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offload.text.tokenizer import encode
from quant.errors import InputError


@dataclass(frozen=True)
class Windows:
    """``ids`` int64 ``[B, T]``: B windows of T tokens that follow each other in the text, as it is."""

    ids: Tensor

    @classmethod
    def cut(cls, text: str, tokenizer: Any, length: int, count: int | None = None) -> "Windows":
        """The first ``count`` whole windows of ``length`` tokens (None: all there are).

        The text begins as the tokenizer begins one. Raises InputError if it does not hold that many, or none.
        """
        ids = encode(tokenizer, text)
        there = len(ids) // length
        wanted = there if count is None else count
        if wanted < 1 or there < wanted:
            raise InputError(
                f"the text has {len(ids):,} tokens, {there:,} windows of {length:,}: expected at least "
                f"{max(wanted, 1):,}; give a longer text"
            )
        return cls(torch.tensor(ids[: wanted * length]).view(wanted, length))

    @property
    def tokens(self) -> int:
        return self.ids.numel()

    @property
    def identity(self) -> str:
        """A hash over the tokens and how they are cut: 16 hex digits."""
        digest = hashlib.sha256(f"{tuple(self.ids.shape)}".encode())
        digest.update(self.ids.numpy().tobytes())
        return digest.hexdigest()[:16]


def tokenizer_identity(tokenizer: Any) -> str:
    """A hash over the vocabulary: two models with the same one read the same text as the same tokens."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(repr(vocabulary).encode()).hexdigest()[:16]
