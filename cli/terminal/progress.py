"""One progress bar for everything that takes long: what, how far, how fast, how long still.

Drawn on stderr while the work lasts, then gone: the line that a command says next tells what came of it. Nothing is
drawn where stderr is no terminal, or the console is to say nothing.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cli.terminal.console import Console
from quant.progress import Progress, nobody
from quant.sizes import format_size

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress_bar import ProgressBar

_WIDE = 90  # columns from which on the bar has its full width
_WORDS = 42  # columns that the words beside the bar take if nothing is left out of them
_QUICK = 0.5  # seconds after which a bar appears
_SETTLE = 2.0  # seconds before which the time left is anybody's guess


@contextmanager
def progress_bar(console: Console, title: str, unit: str) -> Iterator[Progress]:
    """A bar called ``title`` that counts in ``unit`` ("bytes", "layers", "tokens" …); it yields what the library calls.

    With an empty ``title`` the bar is called what the work says it is doing, and begins anew when that changes.
    """
    if not console.draws:
        yield nobody
        return
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.table import Column
    from rich.text import Text

    clock = Clock(unit)

    def width(task: Task) -> int:
        # What there is no room for goes: first of the bar, then of the words. Never a second line.
        columns = console.rich.width
        most = 40 if columns >= _WIDE else 12
        return max(6, min(most, columns - len(task.description) - 2 - _WORDS))

    class Bar(Progress):
        def get_renderables(self) -> "Iterable[RenderableType]":
            # What is over at once would only flicker.
            return super().get_renderables() if clock.passed > _QUICK else ()

    class Drawn(BarColumn):
        def render(self, task: Task) -> "ProgressBar":
            self.bar_width = width(task)
            return super().render(task)

    class Said(ProgressColumn):
        max_refresh = 0.5

        def render(self, task: Task) -> Text:
            return Text(clock.said(console.rich.width - len(task.description) - 2 - width(task)))

    bar = Bar(
        TextColumn("{task.description}", markup=False),
        Drawn(),
        Said(Column(no_wrap=True)),
        console=console.rich,
        transient=True,
        refresh_per_second=4,
    )
    with bar:
        task = bar.add_task(title, total=None)

        def show(done: int, total: int, what: str) -> None:
            name = title or what
            if name != bar.tasks[0].description:
                clock.restart()
                bar.reset(task, description=name)
            clock.tell(done, total)
            bar.update(task, completed=done, total=total)

        yield show


class Clock:
    """How far, how fast and how long still, in words. The pace is the mean since the first call, whose ``done`` may be
    what an earlier run had done; between two calls the time left runs down, by no more than such a step was worth."""

    def __init__(self, unit: str, now: Callable[[], float] = time.monotonic) -> None:
        self._unit, self._now = unit, now
        self.restart()

    def restart(self) -> None:
        """Begin anew with something else."""
        self._begun: tuple[float, int] | None = None
        self._last = (0.0, 0, 0)
        self._step = 0

    @property
    def passed(self) -> float:
        """Seconds since it was told something first."""
        return 0.0 if self._begun is None else self._now() - self._begun[0]

    def tell(self, done: int, total: int) -> None:
        """``done`` parts of ``total`` now."""
        if self._begun is not None:
            self._step = done - self._last[1]
        self._last = (self._now(), done, total)
        self._begun = self._begun or (self._last[0], done)

    def said(self, room: int = 1000) -> str:
        """What there is to say now, in ``room`` columns: less of it where these are few."""
        if self._begun is None:
            return ""
        (_, done, total), rate, left = self._last, self._rate(), self._left()
        far, part = self._far(done, total), f"{done / max(total, 1):.0%}".replace("%", " %")
        sayings = [", ".join(filter(None, said)) for said in ((far, rate, left), (far, left), (part, left), (left,))]
        return next((said for said in sayings if 0 < len(said) <= room), part)

    def _rate(self) -> str:
        passed, made = self._pace()
        return f"{made / passed / 1e6:,.0f} MB/s" if self._unit == "bytes" and passed > 0 and made > 0 else ""

    def _left(self) -> str:
        (when, done, total), (passed, made) = self._last, self._pace()
        if not (passed > _SETTLE and made > 0 and done < total):
            return ""
        each = passed / made
        # Work that stands still for longer than a step takes has more than nothing left.
        seconds = max((total - done) * each - (self._now() - when), (total - done - self._step) * each)
        return f"{duration(seconds)} left" if seconds >= 1 else "nearly done"

    def _pace(self) -> tuple[float, int]:
        """Seconds, and what was done in them, up to the last call."""
        began, start = self._begun or (0.0, 0)
        return self._last[0] - began, self._last[1] - start

    def _far(self, done: int, total: int) -> str:
        if self._unit == "bytes":
            return f"{format_size(done)} of {format_size(total)}"
        return f"{done:,} of {total:,} {self._unit}"


def duration(seconds: float) -> str:
    """A time as people say it: ``8 s``, ``4 min 10 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes < 10 else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"
