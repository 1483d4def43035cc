"""SlotTable: which expert holds which slot of a tier."""

from offload.tiers import Key


class SlotTable:
    """``slots`` slots, each free or an expert's. ``free`` lists the first, ``slot_of`` has the others."""

    def __init__(self, slots: int) -> None:
        self.free = list(range(slots - 1, -1, -1))
        self.slot_of: dict[Key, int] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self.slot_of

    def take(self, key: Key) -> int:
        """A free slot, now ``key``'s."""
        slot = self.free.pop()
        self.slot_of[key] = slot
        return slot

    def release(self, key: Key) -> None:
        """Forget ``key``; its slot is free."""
        self.free.append(self.slot_of.pop(key))
