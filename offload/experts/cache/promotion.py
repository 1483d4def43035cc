"""Promotion: what the device should hold, a few copies at a time, with every expert in reach all along.

A hot expert is copied into a free slot. Once it has landed, its host slot is free: the cold one that it
stands in for is read into it from disk, behind everything else, and only then leaves the device.
"""

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from offload.experts.cache.address_table import VRAM
from offload.routing.frequency import Mask
from offload.tiers import Key

if TYPE_CHECKING:
    from offload.experts.cache.tiered_cache import TieredCache

SWAPS = 1  # experts on their way to the device at a time; one begins between two steps


class Promotion:
    """The experts that come to the device of ``cache`` and leave it. ``leaving`` has the cold ones, each with
    the hot one that it makes way for."""

    def __init__(self, cache: "TieredCache") -> None:
        self.cache = cache
        self.leaving: dict[Key, Key] = {}
        self._planned: tuple[Key, Key | None] | None = None  # the next to come, and who would make way

    def seed(self, seeds: Sequence[Key]) -> None:
        """Copy ``seeds`` to the device, as many as have room, and wait for them. Raises CheckpointError if
        the disk fails."""
        cache = self.cache
        wanted = deque(seeds[: cache.vram.slots.count - cache.reserve])
        while wanted:
            ahead = list(wanted)[: cache.window()]
            for key in ahead[1:]:
                cache.wants_source(key, set(ahead), wait=False)
            cache.wants_source(wanted[0], set(ahead), wait=True)
            cache.copy_to_device(wanted.popleft())
            self.land()
        while cache.vram.arriving:
            cache.wait_for_slot()

    def land(self) -> None:
        """Make residents of the experts that have landed, and free their host slots."""
        cache = self.cache
        for key in cache.vram.landed():
            if key in cache.host:
                cache.release(key)
            cache.tables.set(key, VRAM, cache.vram.address(key))

    def plan(self) -> None:
        """Decide which expert should come to the device next, by what is asked for lately. This may be done
        while a step runs: nothing moves before ``step``, which looks again whether it can."""
        cache = self.cache
        outside: Mask = cache.tables.where() != VRAM
        for key in cache.vram.arriving:
            outside[cache.tables.row(key[0]), key[1]] = False
        hot = cache.heat.hottest(outside)
        staying = self._residents()
        for key in self.leaving:
            staying[cache.tables.row(key[0]), key[1]] = False
        self._planned = None if hot is None else (hot, cache.heat.coldest(staying))

    def step(self) -> None:
        """Go on with what is under way, and begin what is planned if that is worth a copy."""
        cache = self.cache
        self.land()
        self._let_leave()
        planned, self._planned = self._planned, None
        # A host slot whose copy is under way cannot be overwritten: one at least must not be such.
        if planned is not None and len(cache.vram.arriving) < min(SWAPS, cache.arena.slots - 1):
            self._begin(*planned)

    def coldest(self) -> Key | None:
        """The resident that is missed least; one that is leaving anyway goes first."""
        leaving = next((key for key in self.leaving if self.cache.vram.resident(key)), None)
        return leaving or self.cache.heat.coldest(self._residents())

    def _let_leave(self) -> None:
        """Let cold experts go whose host copy is there, and begin reading that of those whose turn has
        come."""
        cache = self.cache
        for key, hot in list(self.leaving.items()):
            if hot in cache.vram.arriving:
                continue
            if key not in cache.host and cache.host.free:
                cache.read_behind(key)
            elif not cache.reading(key):  # it is there, or its place in RAM went to one that was asked for
                cache.drop_resident(key)

    def _begin(self, hot: Key, cold: Key | None) -> None:
        """Begin moving ``hot`` to the device, where ``cold`` makes way if no slot is to spare, if that can be
        done now and is worth it."""
        cache = self.cache
        if hot in cache.vram or not cache.vram.free:
            return
        if cache.vram.free > cache.reserve:
            cold = None
        elif cold is None or not self._may_leave(cold) or not cache.heat.worth_swapping(cold, hot):
            return
        cache.read_behind(hot)
        if hot not in cache.host or cache.reading(hot):
            return
        cache.copy_to_device(hot)
        if cold is not None:
            self.leaving[cold] = hot

    def _may_leave(self, key: Key) -> bool:
        enough = len(self.leaving) >= self.cache.reserve
        return not enough and key not in self.leaving and self.cache.vram.resident(key)

    def _residents(self) -> Mask:
        found: Mask = self.cache.tables.where() == VRAM
        return found
