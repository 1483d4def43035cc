"""Ctrl-C ends a command at once, also where Python would lose it.

Python turns the signal into an exception. In the middle of an import (torch takes seconds) that leaves
modules half made, and whoever catches it there may go on and fail oddly: so the process ends on the spot.
Elsewhere the exception unwinds as it should, but a callback or a destructor that happens to run may swallow
it: so a timer is started with it, and ends the process if nothing else has.
"""

import os
import signal
import sys
from contextlib import suppress
from types import FrameType

INTERRUPTED = 130
_GRACE_SECONDS = 1.5


def install() -> None:
    """Take over SIGINT and SIGALRM."""
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGALRM, _give_up)


def keep_session() -> None:
    """From now on an interrupt is an exception and nothing more: the command deals with it and goes on."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def end_on_signals() -> None:
    """From now on SIGTERM, and a terminal that is closed, end the command as it would end by itself."""

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # once is enough
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)


class StopRequest:
    """While it is entered, the first Ctrl-C is an exception, and ``asked`` says so to whoever did not see it;
    the next one ends the process at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "StopRequest":
        self._before = signal.signal(signal.SIGINT, self._first)
        return self

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGINT, _give_up if self.asked else self._before)

    def _first(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, _give_up)
        raise KeyboardInterrupt


def leave() -> None:
    """End the process with code 130, without waiting for torch to be taken down.

    Not by SystemExit: Python would die of the signal, caught or not, if it came while something was compiled
    (as every dataclass is).
    """
    with suppress(OSError, RuntimeError):  # a closed pipe; a signal in the midst of a write
        if sys.stderr.isatty():  # a progress bar hides the cursor, and nothing may have brought it back
            sys.stderr.write("\x1b[?25h")
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(INTERRUPTED)


def _interrupt(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _give_up(number, frame)
        frame = frame.f_back
    signal.setitimer(signal.ITIMER_REAL, _GRACE_SECONDS)
    raise KeyboardInterrupt


def _give_up(number: int, frame: FrameType | None) -> None:
    print("\ncoldstream: interrupted", file=sys.stderr)
    leave()
