"""The end of a run: its report on the terminal, as a page and as JSON; and whether there will be room for it."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.terminal.console import Console
from quant.output_file import check_name

if TYPE_CHECKING:  # it imports torch
    from offload.run.report import RunReport


def finish(report: "RunReport", console: Console, page: Path | None, extra: dict[str, Any] | None = None) -> None:
    """Say the report, write its page if one was asked for, and print it as JSON under ``--json``."""
    from cli.html.run_report import write_page
    from cli.terminal.run_summary import INDENT, summary_rows

    if not console.quiet or report.subject.command == "bench":  # elsewhere the text is the result
        console.rows(summary_rows(report, said=console.said, every_role=console.verbose), INDENT)
    if page is not None:
        write_page(report, page)
        console.step(f"report page written to {page}")
    console.result({**(extra or {}), **report.to_json()})


def command_line() -> str:
    """What was typed, quoted so that a shell takes it again."""
    return shlex.join(["coldstream", *sys.argv[1:]])


def check_page(page: Path | None, option: str = "--report") -> None:
    """Raise OutputError now, not after the run, if what ``option`` names cannot become a file."""
    if page is not None:
        check_name(page, option)
