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

_WIDE = 90  # columns from which on the bar has its full width
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
    from rich.text import Text

    clock = Clock(unit)

    class Bar(Progress):
        def get_renderables(self) -> "Iterable[RenderableType]":
            # What is over at once would only flicker.
            return super().get_renderables() if clock.passed > _QUICK else ()

    class Said(ProgressColumn):
        max_refresh = 0.5

        def render(self, task: Task) -> Text:
            return Text(clock.said())

    bar = Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=40 if console.rich.width >= _WIDE else 12),
        Said(),
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
    what an earlier run had done; between two calls the time left runs down."""

    def __init__(self, unit: str, now: Callable[[], float] = time.monotonic) -> None:
        self._unit, self._now = unit, now
        self.restart()

    def restart(self) -> None:
        """Begin anew with something else."""
        self._begun: tuple[float, int] | None = None
        self._last = (0.0, 0, 0)

    @property
    def passed(self) -> float:
        """Seconds since it was told something first."""
        return 0.0 if self._begun is None else self._now() - self._begun[0]

    def tell(self, done: int, total: int) -> None:
        """``done`` parts of ``total`` now."""
        self._last = (self._now(), done, total)
        self._begun = self._begun or (self._last[0], done)

    def said(self) -> str:
        """What there is to say now."""
        if self._begun is None:
            return ""
        (began, start), (when, done, total) = self._begun, self._last
        passed, made = when - began, done - start
        parts = [self._far(done, total)]
        if passed > 0 and made > 0:
            if self._unit == "bytes":
                parts.append(f"{made / passed / 1e6:,.0f} MB/s")
            left = (total - done) * passed / made - (self._now() - when)
            if passed > _SETTLE and done < total:
                parts.append(f"{duration(left)} left" if left >= 1 else "nearly done")
        return ", ".join(parts)

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
