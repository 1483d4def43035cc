"""Regain: device memory that went to other programs is taken again when they leave it. Unproven, off by default.

No run on a card has shown yet that this is worth it. Slots come back a segment at a time, at another address:
nothing refers to a slot but by the tables, which say where an expert is once it has been copied there. Only
what was given up for others comes back, that is when the driver had less left than this process was still
allowed. A run that ran into its own limit would do so again.
"""

from offload.experts.cache.device_tier import DeviceTier
from quant.errors import BudgetError

_TOKENS = 256  # between two looks at what the driver has
_LOOKS = 3  # that must find room, one after another; each one after them takes another segment
_SPARE = 64 * 2**20  # bytes left free beside a segment that is taken again


class Regain:
    """Takes segments again that ``tier`` has given back. ``spare`` bytes stay free beside one that is. Each time
    that such a segment must be given back after all, the next wait is twice as long."""

    def __init__(self, tier: DeviceTier, spare: int = _SPARE) -> None:
        self.tier, self.spare = tier, spare
        self._lost: list[int] = []  # segments that went to others, by their first slots
        self._tokens = self._found = self._regained = 0
        self._patience = _LOOKS

    def lost(self, segment: range, *, to_others: bool) -> None:
        """Note that ``segment`` was given back; ``to_others``: because other programs took the memory."""
        if to_others:
            self._lost.append(segment.start)
        if self._regained:
            self._patience, self._regained = 2 * self._patience, 0
        self._found = self._tokens = 0

    def look(self) -> bool:
        """Between two steps: whether a segment was taken again, because there has been room for a while."""
        if not self._lost:
            return False
        self._tokens += 1
        if self._tokens % _TOKENS:
            return False
        first = self._lost[-1]
        free, allowed = self.tier.transfer.memory_left()
        wanted = self.tier.slots.segment_bytes(first)
        self._found = self._found + 1 if min(free - self.spare, allowed) >= wanted else 0
        if self._found < self._patience:
            return False
        try:
            self.tier.regain(first)
        except BudgetError:  # another program was quicker
            self._found, self._patience = 0, 2 * self._patience
            return False
        self._lost.pop()
        self._regained += 1
        return True
