"""The context of a run that nobody asked a length of: what the budget has left once the experts have theirs.

A token of context takes memory that experts could have, so experts come first: the context gets what they cannot use,
and what more of it costs is said. Pure Python: what fits is asked of the caller.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

_STEP = 1024  # tokens, that a context is rounded down to
_SHORTEST = 4096
_POINTS = 12  # of a curve, at most


@dataclass(frozen=True)
class ContextPrediction:
    """A run with room for ``context`` tokens: its KV cache has ``kv_bytes``, VRAM and RAM hold ``experts`` of the
    routed ones. Decode is ``tokens_per_s`` with as few tokens in the cache as the plan's prediction has, and
    ``full_tokens_per_s`` once it is full, which computing a prompt of that length takes ``fill_seconds``."""

    context: int
    kv_bytes: int
    experts: int
    tokens_per_s: float
    full_tokens_per_s: float
    fill_seconds: float

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def longest_that(fits: Callable[[int], bool], least: int, most: int) -> int:
    """The longest context from ``least``, which fits, to ``most`` that ``fits``: in whole thousands (1,024) where it is
    neither. What fits is to fit if it is shorter, too."""
    if most <= least or fits(most):
        return max(least, most)
    low, high = least // _STEP, -(-most // _STEP)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * _STEP) else (low, middle)
    return max(least, low * _STEP)


def curve_of(chosen: int, most: int) -> list[int]:
    """Contexts that are worth comparing with ``chosen``: twice as many tokens at a time up to ``most``, and twice
    ``chosen`` if that is no more."""
    points = {chosen, 2 * chosen, *(_SHORTEST << power for power in range(_POINTS)), most}
    return sorted(tokens for tokens in points if 0 < tokens <= max(most, chosen))
