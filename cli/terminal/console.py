"""What a command says: human text to stderr, its result to stdout.

With ``--json`` nothing human is printed, and the last line of stdout is one JSON document.
"""

import sys
import textwrap
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from cli.terminal.visible import visible
from offload.documents import SCHEMA_VERSION, to_json
from quant.errors import UsageError

if TYPE_CHECKING:  # rich costs 0.1 s, and --help never prints with it
    from rich.console import Console as RichConsole
    from rich.table import Table


class Console:
    """One command's voice. ``json`` silences it for humans; the document goes out through ``result``.

    ``quiet`` leaves only the result: no steps, notes or progress. ``verbose`` says when each step began.
    """

    def __init__(self, *, json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        if quiet and verbose:
            raise UsageError("--quiet and --verbose contradict each other: give one")
        self.json, self.quiet, self.verbose = json, quiet, verbose
        self.said: set[str] = set()  # notes
        self._started = time.perf_counter()
        self._rich: RichConsole | None = None

    @property
    def rich(self) -> "RichConsole":
        """rich's console on stderr (quiet under ``--json``)."""
        if self._rich is None:
            self._rich = _rich(quiet=self.json)
        return self._rich

    @property
    def width(self) -> int:
        """Columns of the terminal; 80 where there is none."""
        return self.rich.width

    def say(self, text: str = "") -> None:
        """Lines for a human, as they are: no markup is interpreted, and nothing acts upon the terminal."""
        if not self.json:
            print(visible(text), file=sys.stderr, flush=True)

    def write(self, text: str) -> None:
        """A piece of what a model writes, to stdout, but not under ``--json``."""
        if not self.json:
            print(visible(text), end="", flush=True)

    def prose(self, text: str, hanging: int = 0) -> None:
        """A sentence or more; on a terminal, wrapped to its width, with ``hanging`` blanks from line two on."""
        if not self.json and self.rich.is_terminal:
            text = textwrap.fill(text, self.rich.width, subsequent_indent=hanging * " ", break_on_hyphens=False)
        self.say(text)

    def rows(self, rows: Iterable[tuple[str, str]], indent: str = "") -> None:
        """Aligned lines of a label and a text each."""
        listed = list(rows)
        width = max([9, *(len(label) for label, _ in listed)]) + 1
        for label, text in listed:
            self.prose(f"{indent}{label:<{width}}{text}", len(indent) + width)

    def show(self, table: "Table") -> None:
        """A rich table for a human; where the terminal is too narrow for it, with headings of several lines, and where
        that is not enough, as a sentence for each row. No word is broken."""
        from rich.text import Text

        columns = [[Text.from_markup(str(c)).plain for c in (column.header, *column.cells)] for column in table.columns]
        if self._needs(table, columns) > self.rich.width:
            for column, cells in zip(table.columns, columns, strict=True):
                if column.no_wrap:
                    column.header = cells[0] = cells[0].replace(" ", "\n")
        if self._needs(table, columns) <= self.rich.width:
            self.rich.print(table)
            return
        headings, *rows = zip(*columns, strict=True)
        names = [heading.replace("\n", " ") for heading in headings[1:]]
        for label, *cells in rows:
            said = ", ".join(f"{name} {cell}".strip() for name, cell in zip(names, cells, strict=True) if cell)
            self.prose(f"{label}: {said}", 4)

    @staticmethod
    def _needs(table: "Table", columns: list[list[str]]) -> int:
        """The columns of a terminal that the words of ``table`` take."""
        between = 2 if table.box is None else 3
        parts = (
            [part for cell in cells for part in (cell.splitlines() if column.no_wrap else cell.split())]
            for column, cells in zip(table.columns, columns, strict=True)
        )
        return sum(max(map(len, words), default=0) + between for words in parts) - between

    def step(self, text: str) -> None:
        """What is being done now: a line that starts the same way in every command."""
        if not self.quiet:
            passed = f" [{time.perf_counter() - self._started:.1f} s]" if self.verbose else ""
            self.prose(f"coldstream:{passed} {text}")

    def notes(self, notes: Iterable[str]) -> None:
        """What the run has to tell: each note a line, and once only."""
        for note in notes:
            if not self.quiet and note not in self.said:
                self.prose(f"note: {note}")
                self.said.add(note)

    @property
    def draws(self) -> bool:
        """Whether something that changes, such as a progress bar, may be drawn: on a terminal that can, for a human."""
        return not (self.json or self.quiet) and self.rich.is_terminal and not self.rich.is_dumb_terminal

    def result(self, document: Mapping[str, Any]) -> None:
        """Print ``document`` as the last line of stdout, under ``--json`` only."""
        if self.json:
            print(to_json({"schema_version": SCHEMA_VERSION, **document}), flush=True)


def _rich(*, quiet: bool) -> "RichConsole":
    from rich.console import Console as RichConsole
    from rich.console import ConsoleOptions, RenderableType
    from rich.segment import Segment

    class Visible(RichConsole):
        """Shows foreign text as it is; what rich itself adds still acts upon the terminal."""

        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else Segment(visible(segment.text), segment.style)

    return Visible(stderr=True, quiet=quiet, highlight=False)
