"""The end of a run: its report on the terminal, as JSON and as a page; and whether there will be room for it."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.terminal.console import Console
from quant.output_file import check_output

if TYPE_CHECKING:  # it imports torch
    from offload.run.report import RunReport


def finish(report: "RunReport", console: Console, page: Path | None, extra: dict[str, Any] | None = None) -> None:
    """Say the report, print it as JSON under ``--json``, and write its page if one was asked for."""
    from cli.html.run_report import write_page
    from cli.terminal.run_summary import INDENT, summary_rows

    if not console.quiet or report.subject.command == "bench":  # elsewhere the text is the result
        console.rows(summary_rows(report, said=console.said, every_role=console.verbose), INDENT)
    console.result({**(extra or {}), **report.to_json()})
    if page is not None:
        write_page(report, page)
        console.step(f"report page written to {page}")


def command_line() -> str:
    """What was typed, quoted so that a shell takes it again."""
    return shlex.join(["coldstream", *sys.argv[1:]])


def check_page(page: Path | None) -> None:
    """Raise OutputError now, not after the run, if ``page`` cannot become a report page."""
    from offload.documents import PAGE_MARK

    check_output(page, "--report", PAGE_MARK)
