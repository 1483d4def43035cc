"""Mailbox: what the thread that runs the model tells the event loop, which is woken once for all tokens of a step."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any


class Mailbox:
    """Of the event loop that runs where it is made. Waking the loop costs the thread that does it the interpreter lock,
    so the thread that calls ``wake`` after every step wakes it then only; any other does with each ``put``."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._said: deque[tuple[Callable[[Any], object], Any]] = deque()
        self._stepping = 0  # the thread that wakes by steps

    def put(self, take: Callable[[Any], object], said: object) -> None:
        """Have the loop call ``take(said)``. Callable from any thread."""
        self._said.append((take, said))
        if threading.get_ident() != self._stepping:
            self._call()

    def wake(self) -> None:
        """A step is over: its tokens are delivered."""
        self._stepping = threading.get_ident()
        if self._said:
            self._call()

    def _call(self) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        while self._said:
            take, said = self._said.popleft()
            take(said)
