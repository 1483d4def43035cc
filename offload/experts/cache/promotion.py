"""Promotion: the most frequent experts come to the device, one between two steps, all of them in reach all along.

A hot expert is copied into a free slot. Once it has landed, its host slot is free: the cold one that it
stands in for is read into it from disk, behind everything else, and only then leaves the device.
"""

from offload.experts.cache.device_tier import DeviceTier, HostSource
from offload.tiers import Key


class Promotion:
    """Decides which expert comes to ``tier`` from ``host`` next, and which makes way for it."""

    def __init__(self, tier: DeviceTier, host: HostSource) -> None:
        self.tier, self.host = tier, host
        self._planned: tuple[Key, Key | None] | None = None  # the next to come, and who would make way

    def plan(self) -> None:
        """Decide by what was asked for lately. This may be done while a step runs: nothing moves before
        ``step``, which looks again whether it can."""
        tier, table, residents = self.tier, self.tier.address_table, self.tier.residents()
        hot = tier.frequency.hottest(~residents & ~table.mask(tier.arriving))
        cold = tier.frequency.coldest(residents & ~table.mask(tier.leaving))
        self._planned = None if hot is None else (hot, cold)

    def step(self) -> None:
        """Go on with what is under way, and begin what is planned if that is worth a copy. No decode step may
        be running."""
        self.tier.land()
        self._let_leave()
        planned, self._planned = self._planned, None
        # One at a time: a host slot that is being copied cannot be overwritten, and there may be only two.
        if planned is not None and not self.tier.arriving:
            self._begin(*planned)

    def _let_leave(self) -> None:
        """Let cold experts go whose host copy is there, and begin reading that of those whose turn has
        come."""
        for key, hot in list(self.tier.leaving.items()):
            if hot in self.tier.arriving:
                continue
            self.host.read_behind(key, evict=False)
            if not self.host.reading(key):  # it is there, or its place in RAM went to one that was asked for
                self.tier.drop(key)

    def _begin(self, hot: Key, cold: Key | None) -> None:
        """Begin moving ``hot`` to the device, where ``cold`` makes way if no slot is to spare, if that can be
        done now and is worth it."""
        tier = self.tier
        if hot in tier or not tier.free:
            return
        if tier.free > tier.reserve:
            cold = None
        elif cold is None or not self._may_leave(cold) or not tier.frequency.worth_swapping(cold, hot):
            return
        self.host.read_behind(hot, evict=True)
        if not self.host.whole(hot):
            return
        tier.load(hot)
        if cold is not None:
            tier.leaving[cold] = hot

    def _may_leave(self, key: Key) -> bool:
        leaving = self.tier.leaving
        return len(leaving) < self.tier.reserve and key not in leaving and self.tier.resident(key)
