"""NgramIndex: what a text itself says will come next, where its latest tokens stood in it before (prompt lookup).

An index as LZ77 has it: for every pair of neighbours the place where it stood last, and for every place the one before.
Adding a token costs one look-up; finding the longest match looks at the latest few places. Policy only: no tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from offload.batch.token_ids import packed_ids

_PLACES = 24  # that are compared at most
_LONGEST = 32  # tokens that are compared at most


@dataclass(frozen=True)
class Proposal:
    """``tokens`` that may come next, and for each how many tokens before it speak for it, those proposed among them."""

    tokens: list[int]
    evidence: list[int]


class NgramIndex:
    """The tokens of a text so far."""

    def __init__(self) -> None:
        self._tokens = packed_ids(())
        self._latest: dict[int, int] = {}  # pair → where its second token stood last
        self._before = packed_ids(())  # place → where the pair that ends there stood before it, or -1

    def extend(self, tokens: Sequence[int]) -> None:
        """``tokens`` is the text now: what is new of it is added."""
        for place in range(len(self._tokens), len(tokens)):
            token = tokens[place]
            self._tokens.append(token)
            if not place:
                self._before.append(-1)
                continue
            pair = tokens[place - 1] << 32 | token
            self._before.append(self._latest.get(pair, -1))
            self._latest[pair] = place

    def propose(self, most: int) -> Proposal:
        """At most ``most`` tokens that followed where the longest match stood, the latest of several. A text that
        repeats itself is followed beyond its end."""
        source, length = self._longest()
        if length < 2:
            return Proposal([], [])
        tokens, known = self._tokens, len(self._tokens)
        found: list[int] = []
        for place in range(source + 1, source + 1 + most):
            found.append(tokens[place] if place < known else found[place - known])
        return Proposal(found, [length + i for i in range(most)])

    def close(self) -> None:
        """The text is over: nothing is kept of it elsewhere."""

    def _longest(self) -> tuple[int, int]:
        tokens, end = self._tokens, len(self._tokens) - 1
        best, longest = -1, 0
        place = self._before[end] if end > 0 else -1
        for _ in range(_PLACES):
            if place < 0 or longest == _LONGEST:
                break
            length, most = 2, min(place + 1, _LONGEST)
            while length < most and tokens[place - length] == tokens[end - length]:
                length += 1
            if length > longest:
                best, longest = place, length
            place = self._before[place]
        return best, longest
