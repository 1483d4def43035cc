"""PageStream: stretches of KV pages from disk into staging places, in the order in which a step asks for them.

Threads read ahead as far as there are places: a place is free again as soon as the next stretch is asked for. What a
step asks for is what the next step will, so when one ends the beginning of the next is being read already.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from offload.prompts.spill_file import SpillFile, Stretch

_READERS = 4
_LOOK_SECONDS = 0.1  # between two looks at whether what is waited for is still wanted


class PageStream:
    """Reads stretches of ``file`` into ``places``, the memory of each as ``SpillFile.read`` takes it."""

    def __init__(self, file: SpillFile, places: Sequence[Sequence[memoryview]]) -> None:
        self.file, self._places = file, places
        self._free = list(range(len(places)))
        self._staged = dict[Stretch, tuple[int, Future[None]]]()
        self._given_up = list[tuple[int, Future[None]]]()  # reads under way that nobody waits for
        self._order: list[Stretch] = []
        self._next, self._in_use = 0, False
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="kv-reader")
        self.read_nbytes = 0  # so far

    def expect(self, order: Sequence[Stretch]) -> None:
        """A step begins that will ask for the stretches of ``order``, and the one after it probably for the same."""
        self._order, self._next, self._in_use = list(order), 0, False
        self._read_ahead()

    def take(self, stretch: Stretch, check: Callable[[], None]) -> int:
        """The place of ``stretch``, which is its own until the next is taken. ``check`` is called while it is waited
        for, and ends that by raising. Raises InputError if the disk does not give it."""
        if self._in_use:
            self._next = (self._next + 1) % len(self._order)
            self._in_use = False
        if not self._order or stretch is not self._order[self._next]:
            if stretch not in self._order:  # it went to disk within the step
                self._order.insert(self._next, stretch)
            self._next = self._order.index(stretch)
        self._read_ahead()
        place, read = self._staged[stretch]
        while not wait([read], _LOOK_SECONDS).done:
            check()
        self._in_use = True
        read.result()
        return place

    def forget(self, stretch: Stretch) -> None:
        """``stretch`` is no more."""
        if stretch in self._staged:
            self._give_up(stretch)

    def close(self) -> None:
        """End the reads."""
        self._readers.shutdown(cancel_futures=True)

    def _window(self) -> list[Stretch]:
        """What is to be in memory: as much of what comes next as there are places for."""
        count = min(len(self._order), len(self._places))
        return [self._order[(self._next + i) % len(self._order)] for i in range(count)]

    def _give_up(self, stretch: Stretch) -> None:
        self._given_up.append(self._staged.pop(stretch))

    def _read_ahead(self) -> None:
        wanted = set(self._window())
        for stretch in [stretch for stretch in self._staged if stretch not in wanted]:
            self._give_up(stretch)
        for place, read in list(self._given_up):
            if read.cancel() or read.done():
                self._given_up.remove((place, read))
                self._free.append(place)
        for stretch in self._window():
            if stretch in self._staged:
                continue
            if not self._free:
                if not self._given_up or stretch is not self._order[self._next]:
                    break
                wait([read for _, read in self._given_up], return_when="FIRST_COMPLETED")
                return self._read_ahead()
            place = self._free.pop()
            self._staged[stretch] = place, self._readers.submit(self.file.read, stretch, self._places[place])
            self.read_nbytes += self.file.nbytes
