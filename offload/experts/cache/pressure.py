"""MemoryPressure: device slots given back to the driver when memory runs out, taken again when there is room.

Slots lie in segments, so one goes back as a whole and comes back as a whole, at another address: nothing
refers to a slot but by the tables, which say where an expert is once it has been copied there. Only what was
given up for others comes back, that is when the driver had less left than this process was still allowed. A
run that ran into its own limit would do so again.
"""

from typing import TYPE_CHECKING

from quant.errors import BudgetError
from quant.sizes import format_size

if TYPE_CHECKING:
    from offload.experts.cache.tiered_cache import TieredCache

_TOKENS = 256  # between two looks at what the driver has
_LOOKS = 3  # that must find room, one after another; each one after them takes another segment
_SPARE = 64 * 2**20  # bytes left free beside a segment that is taken again
_NOTE = "the GPU ran out of memory, within --vram or beside another program: expert slots were given back"


class MemoryPressure:
    """The segments that ``cache`` has given back. ``spare`` bytes stay free where one is taken again; who has
    given up again what was taken again waits twice as long."""

    def __init__(self, cache: "TieredCache", spare: int = _SPARE) -> None:
        self.cache, self.spare = cache, spare
        self._lost: list[int] = []  # segments that went to others, by their first slots
        self._tokens = self._found = self._regained = 0
        self._patience = _LOOKS

    def shrink(self) -> int:
        """Give the coldest segment back; returns its bytes, 0 if there is none to spare."""
        cache, vram = self.cache, self.cache.vram
        segments = list(vram.slots.segments())
        if len(segments) < 2:
            return 0
        free, allowed = cache.transfer.room()
        cache.transfer.drain()
        cache.staging.close()
        cache.swaps.land()
        holding, heat = {slot: key for key, slot in vram.table.slot_of.items()}, cache.heat
        coldest = min(segments, key=lambda part: sum(heat.score(holding[slot]) for slot in part if slot in holding))
        for key in [holding[slot] for slot in coldest if slot in holding]:
            cache.drop_resident(key)
        nbytes = vram.drop(coldest)
        if free < allowed:
            self._lost.append(coldest.start)
        if self._regained:
            self._patience, self._regained = 2 * self._patience, 0
        self._found = self._tokens = 0
        self._say("and the other experts run from RAM or disk")
        return nbytes

    def look(self) -> None:
        """Between two steps: if there has been room for a while, take a segment again. Promotion fill it."""
        if not self._lost:
            return
        self._tokens += 1
        if self._tokens % _TOKENS:
            return
        vram, first = self.cache.vram, self._lost[-1]
        free, allowed = self.cache.transfer.room()
        wanted = vram.slots.segment_bytes(first)
        self._found = self._found + 1 if min(free - self.spare, allowed) >= wanted else 0
        if self._found < self._patience:
            return
        try:
            vram.regain(first)
        except BudgetError:  # somebody was quicker
            self._found, self._patience = 0, 2 * self._patience
            return
        self._lost.pop()
        self._regained += 1
        self._say("some were taken again when there was room, and fill as experts are asked for")

    def _say(self, rest: str) -> None:
        cache = self.cache
        cache.resized()
        slots = cache.vram.slots
        cache.notes[:] = [found for found in cache.notes if not found.startswith(_NOTE)]
        cache.notes.append(f"{_NOTE}; {slots.count} ({format_size(slots.nbytes)}) are there now, {rest}")
