"""SlotTable: which expert holds which slot of a tier."""

from collections.abc import Callable, Collection, Iterable, Iterator

from offload.tiers import Key


class SlotTable:
    """``slots`` slots, each free or an expert's. ``free`` lists the first, ``slot_of`` has the others.

    Where experts differ in size, by ``size`` in bytes, those in slots take ``limit`` together at the most.
    """

    def __init__(self, slots: int, limit: int | None = None, size: Callable[[Key], int] = lambda key: 1) -> None:
        self.free = list(range(slots - 1, -1, -1))
        self.slot_of: dict[Key, int] = {}
        self._left, self._size = slots if limit is None else limit, size if limit is not None else lambda key: 1

    def __contains__(self, key: Key) -> bool:
        return key in self.slot_of

    def has_room(self, key: Key, without: Collection[Key] = ()) -> bool:
        """Whether ``key`` could be taken in, if those ``without`` had no slots."""
        if self.free and self._size(key) <= self._left:
            return True
        return bool(without) and self._size(key) <= self._left + sum(map(self._size, without))

    def fitting(self, keys: Iterable[Key]) -> Iterator[Key]:
        """The first of ``keys`` that could all be taken in, and smaller ones after them."""
        slots, left = len(self.free), self._left
        for key in keys:
            if slots and self._size(key) <= left:
                slots, left = slots - 1, left - self._size(key)
                yield key

    def take(self, key: Key) -> int:
        """A free slot, now ``key``'s."""
        slot = self.free.pop()
        self.slot_of[key] = slot
        self._left -= self._size(key)
        return slot

    def release(self, key: Key) -> None:
        """Forget ``key``; its slot is free."""
        self.free.append(self.slot_of.pop(key))
        self._left += self._size(key)
