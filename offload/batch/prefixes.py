"""Prefixes: what sequences that are over have left, for those that begin alike.

A conversation goes on from its last turn, and agents share their instructions: only what is new is computed. What
was used longest ago is forgotten first, when its memory is wanted.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from offload.batch.token_ids import common, frozen

Cached = TypeVar("Cached")
_MOST = 64


@dataclass(frozen=True)
class Prefix(Generic[Cached]):
    """Tokens, and what is kept of them."""

    tokens: npt.NDArray[np.int32]
    kept: Cached

    @classmethod
    def of(cls, tokens: Sequence[int], kept: Cached) -> "Prefix[Cached]":
        """``tokens`` and what is kept of them."""
        return cls(frozen(tokens), kept)

    def common(self, tokens: npt.NDArray[np.int32]) -> int:
        """How many tokens both begin with."""
        return common(self.tokens, tokens)


class Prefixes(Generic[Cached]):
    """Sequences that are over, the one used last at the end. ``free`` gives back what is kept of one."""

    def __init__(self, free: Callable[[Cached], None]) -> None:
        self._free = free
        self._prefixes: list[Prefix[Cached]] = []

    def __len__(self) -> int:
        return len(self._prefixes)

    def __iter__(self) -> Iterator[Prefix[Cached]]:
        return iter(self._prefixes)

    def keep(
        self, tokens: Sequence[int], kept: Cached, instead_of: Prefix[Cached] | None = None
    ) -> Prefix[Cached] | None:
        """Remember ``tokens``, of which there is ``kept``, and forget another; returns what is remembered."""
        if instead_of is not None and self.take(instead_of):
            self._free(instead_of.kept)
        if not tokens:
            self._free(kept)
            return None
        prefix = Prefix.of(tokens, kept)
        self._prefixes.append(prefix)
        if len(self._prefixes) > _MOST:
            self.forget()
        return prefix

    def matching(
        self, tokens: Sequence[int], others: Iterable[Prefix[Cached]] = ()
    ) -> list[tuple[int, Prefix[Cached]]]:
        """Those, and of ``others``, that begin as ``tokens`` does: how far, the longest first."""
        wanted = frozen(tokens)
        found = [(prefix.common(wanted), prefix) for prefix in (*self._prefixes, *others)]
        return sorted((pair for pair in found if pair[0]), key=lambda pair: -pair[0])

    def use(self, prefix: Prefix[Cached]) -> None:
        """``prefix`` was of use just now."""
        if self.take(prefix):
            self._prefixes.append(prefix)

    def take(self, prefix: Prefix[Cached]) -> bool:
        """Forget ``prefix`` without giving back what is kept of it: a sequence goes on with that. False if it is none
        of these."""
        before = len(self._prefixes)
        self._prefixes = [other for other in self._prefixes if other is not prefix]
        return len(self._prefixes) < before

    def forget(self) -> bool:
        """Give back what is kept of the one used longest ago; False if there is none."""
        if not self._prefixes:
            return False
        self._free(self._prefixes.pop(0).kept)
        return True

    def clear(self) -> None:
        """Forget all."""
        while self.forget():
            pass

    @property
    def last_tokens(self) -> int:
        """Tokens of the one used last."""
        return len(self._prefixes[-1].tokens) if self._prefixes else 0
