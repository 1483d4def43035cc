"""Scheduler: whose tokens are run in the next step.

One prompt is computed at a time, a chunk per step, and between two chunks every sequence that has begun gets a token:
a long prompt stops the others for one chunk at the most. Prompts wait in the order in which they came, and so does a
sequence that had to give its pages up. Policy only: who has room is for the caller to say.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Schedulable(Protocol):
    """A sequence, as far as its turn goes. ``number`` says who came first."""

    number: int


Item = TypeVar("Item", bound=Schedulable)


@dataclass(frozen=True)
class Step(Generic[Item]):
    """A chunk of the prompt of one sequence, or one token of each of ``rows``."""

    rows: list[Item]
    prefill: bool


class Scheduler(Generic[Item]):
    """Turns for any number of sequences, of which at most ``max_rows`` run at once.

    ``waiting`` have not begun, ``prefilling`` is the one whose prompt is being computed, ``decoding`` get a token per
    step.
    """

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self.waiting: deque[Item] = deque()
        self.prefilling: Item | None = None
        self.decoding: list[Item] = []
        self._chunk_was_last = False

    @property
    def running(self) -> list[Item]:
        """All that have begun."""
        return self.decoding if self.prefilling is None else [*self.decoding, self.prefilling]

    def add(self, item: Item) -> None:
        """Let ``item`` wait for its turn."""
        self.waiting.append(item)

    def next(self, admit: Callable[[Item], bool]) -> Step[Item] | None:
        """The next step, None if there is nothing to do. ``admit`` makes room for a sequence that would begin now, or
        says that there is none."""
        if self.prefilling is None and self.waiting and len(self.decoding) < self.max_rows and admit(self.waiting[0]):
            self.prefilling = self.waiting.popleft()
        self._chunk_was_last = self.prefilling is not None and not (self._chunk_was_last and self.decoding)
        if self._chunk_was_last and self.prefilling is not None:
            return Step([self.prefilling], prefill=True)
        return Step(list(self.decoding), prefill=False) if self.decoding else None

    def prefilled(self) -> None:
        """The prompt is computed: from now on its sequence gets a token per step."""
        assert self.prefilling is not None, "only a prompt that has begun can be through"
        self.decoding.append(self.prefilling)
        self.prefilling = None

    def remove(self, item: Item) -> None:
        """``item`` is over, whatever it was about."""
        if self.prefilling is item:
            self.prefilling = None
        elif item in self.decoding:
            self.decoding.remove(item)
        else:
            self.waiting.remove(item)

    def preempt(self) -> Item | None:
        """Send the one that came last of those that have begun back to the head of those that wait, so that the others
        can go on; None if only one has begun."""
        if len(self.running) < 2:
            return None
        last = max(self.running, key=lambda item: item.number)
        self.remove(last)
        self.waiting.appendleft(last)
        return last
