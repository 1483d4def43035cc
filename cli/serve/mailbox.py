"""Mailbox: what the thread that runs the model tells the event loop, which is woken once for all tokens of a step, and
of steps that are shorter than a pause, once for all that fell into it."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress

# Of each answer that has news, and of all: a write costs as much as the text of several tokens, and no reader sees the
# difference.
PAUSE_SECONDS, LONGEST_SECONDS = 0.004, 0.016


class Mailbox:
    """Of the event loop that runs where it is made. Waking the loop costs the thread that does it the interpreter lock,
    so the thread that calls ``wake`` after every step wakes it then only; any other does with each ``put``.

    After a step's tokens the loop hears of the next ones when a pause is over, the longer the more answers had some: so
    that they cost the model no more time than one. A step that takes longer wakes it at once: its tokens are never
    late.
    """

    def __init__(self, pause: float = PAUSE_SECONDS) -> None:
        self._loop, self._pause = asyncio.get_running_loop(), pause
        self._said: deque[Callable[[], object]] = deque()
        self._stepping = 0  # the thread that wakes by steps
        self._pausing = False

    def put(self, call: Callable[[], object]) -> None:
        """Have the loop call ``call``. Callable from any thread."""
        self._said.append(call)
        if threading.get_ident() != self._stepping:
            self._call(self._deliver)

    def wake(self) -> None:
        """A step is over: its tokens are delivered."""
        self._stepping = threading.get_ident()
        if self._said and not self._pausing:
            self._call(self._begin_pause)

    def _call(self, what: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(what)

    def _begin_pause(self) -> None:
        if not self._pausing:
            self._pausing = True
            pause = min(self._pause * max(len(self._said), 1), max(self._pause, LONGEST_SECONDS))
            self._loop.call_later(pause, self._end_pause)
        self._deliver()

    def _end_pause(self) -> None:
        self._pausing = False  # before it looks: what is said from now on wakes the loop
        if self._said:
            self._begin_pause()

    def _deliver(self) -> None:
        while self._said:
            self._said.popleft()()
