"""PageStream: stretches of KV pages from disk into staging places, in the order in which a step asks for them.

Threads read ahead as far as there are places: a place is free again as soon as the next stretch is asked for. What a
step asks for is what the next step will, so when one ends the beginning of the next is being read already.

Of a stretch all pages are wanted or some: bit i of a number stands for its i-th page, ALL for every one.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from offload.prompts.spill_file import ALL, SpillFile, Stretch

_READERS = 4
_LOOK_SECONDS = 0.1  # between two looks at whether what is waited for is still wanted
Want = tuple[Stretch, int]  # and which of its pages


@dataclass
class _Staged:
    """A place, the pages of a stretch that are there or on their way to it, and the reads that bring them."""

    place: int
    pages: int = 0
    reads: list[Future[None]] = field(default_factory=list)

    def cancel(self) -> bool:
        """Whether nothing more will be written to the place."""
        for read in self.reads:
            read.cancel()
        return all(read.done() for read in self.reads)


class PageStream:
    """Reads stretches of ``file`` into ``places``, the memory of each as ``SpillFile.read`` takes it."""

    def __init__(self, file: SpillFile, places: Sequence[Sequence[memoryview]]) -> None:
        self.file, self._places = file, places
        self._free = list(range(len(places)))
        self._staged = dict[Stretch, _Staged]()
        self._given_up = list[_Staged]()  # reads under way that nobody waits for
        self._coming = deque[Want]()
        self._taken = list[Want]()  # of this step, the last one first in use
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="kv-reader")
        self.read_nbytes = 0  # so far

    def expect(self, order: Iterable[Want]) -> None:
        """A step begins that will ask for the stretches of ``order``, and the one after it probably for the same."""
        self._coming, self._taken = deque(order), []
        self._read_ahead(None)

    def correct(self, wanted: Mapping[Stretch, int], over: Iterable[Stretch]) -> None:
        """``wanted`` is asked for next, and no more of those that are ``over``."""
        gone = set(over)
        rest = [(one, pages & ~wanted.get(one, 0)) for one, pages in self._coming if one not in gone]
        self._coming = deque([*wanted.items(), *(want for want in rest if want[1])])
        self._read_ahead(None)

    def take(self, stretch: Stretch, check: Callable[[], None], pages: int = ALL) -> int:
        """The place of ``stretch``, in which its ``pages`` are until the next is taken. ``check`` is called while it is
        waited for, and ends that by raising. Raises InputError if the disk does not give it."""
        if any(stretch is coming for coming, _ in self._coming):  # else it went to disk within the step
            while self._coming[0][0] is not stretch:
                self._taken.append(self._coming.popleft())
            self._coming.popleft()
        now = (stretch, pages)
        self._read_ahead(now)
        staged = self._staged[stretch]
        for read in list(staged.reads):
            while not wait([read], _LOOK_SECONDS).done:
                check()
        self._taken.append(now)
        for read in staged.reads:
            read.result()
        return staged.place

    def forget(self, stretch: Stretch) -> None:
        """``stretch`` is no more."""
        if stretch in self._staged:
            self._give_up(stretch)

    def close(self) -> None:
        """End the reads."""
        self._readers.shutdown(cancel_futures=True)

    def _window(self, now: Want | None) -> dict[Stretch, int]:
        """What is to be in memory: what is asked for ``now``, or what was last, and as much of what comes next, in this
        step and the one after it, as there are places for."""
        first = [now] if now is not None else self._taken[-1:]
        found = dict[Stretch, int]()
        for of in (first, self._coming, self._taken):
            for stretch, pages in of:
                if stretch not in found and len(found) == len(self._places):
                    return found
                found[stretch] = found.get(stretch, 0) | pages
        return found

    def _give_up(self, stretch: Stretch) -> None:
        self._given_up.append(self._staged.pop(stretch))

    def _read_ahead(self, now: Want | None) -> None:
        wanted = self._window(now)
        for stretch in [stretch for stretch in self._staged if stretch not in wanted]:
            self._give_up(stretch)
        for staged in list(self._given_up):
            if staged.cancel():
                self._given_up.remove(staged)
                self._free.append(staged.place)
        for stretch, pages in wanted.items():
            if stretch not in self._staged:
                if not self._free:
                    if not self._given_up or now is None or stretch is not now[0]:
                        break
                    reads = [read for staged in self._given_up for read in staged.reads]
                    wait([read for read in reads if not read.done()], return_when="FIRST_COMPLETED")
                    return self._read_ahead(now)
                self._staged[stretch] = _Staged(self._free.pop())
            staged = self._staged[stretch]
            missing = pages & ~staged.pages
            if missing:
                staged.pages |= missing
                place = self._places[staged.place]
                staged.reads.append(self._readers.submit(self.file.read, stretch, place, missing))
                self.read_nbytes += self.file.read_nbytes(missing)
