"""What generate, chat and bench do alike: open the model, and end with the report."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.terminal.console import Console
from cli.terminal.imports import seldom_collecting
from offload.records import RunOptions
from quant.errors import CheckpointError, OutputError, ProfileError

if TYPE_CHECKING:  # these import torch
    from offload.run.report import RunReport
    from offload.run.session import Session


def find_model(model: str) -> Path:
    """The directory of ``model``, itself or a Hub id. Raises CheckpointError before torch is imported."""
    from quant.model.hub import resolve_model

    path = resolve_model(model)
    if not (path / "config.json").is_file():
        what = "no config.json in it" if path.is_dir() else "a file" if path.exists() else "no such directory"
        raise CheckpointError(f"{path}: {what}; expected a Hugging Face model directory")
    return path


def open_session(path: Path, run: RunOptions, console: Console) -> "Session":
    """The session of the model in ``path``, its notes said. Raises ColdstreamError."""
    if run.routing is not None and not run.routing.is_file():
        raise ProfileError(f"{run.routing} is no file: expected a profile that `coldstream profile` wrote")
    with seldom_collecting():
        from offload.run.session import Session

    session = Session.open(path, run, progress=console.step)
    console.step(f"loaded in {session.load_seconds:.1f} s, {session.kernel}")
    console.notes([*session.notes, *(session.plan.notes if session.plan else ())])
    return session


def finish(report: "RunReport", console: Console, page: Path | None, extra: dict[str, Any] | None = None) -> None:
    """Say the report, write its page if one was asked for, and print it as JSON under ``--json``."""
    from cli.html.run_report import write_page
    from cli.terminal.run_summary import summary

    console.say(summary(report))
    if page is not None:
        write_page(report, page)
        console.step(f"report page written to {page}")
    console.result({**(extra or {}), **report.to_json()})


def command_line() -> str:
    """What was typed, quoted so that a shell takes it again."""
    return shlex.join(["coldstream", *sys.argv[1:]])


def check_page(page: Path | None, option: str = "--report") -> None:
    """Raise OutputError now, not after the run, if what ``option`` names cannot become a file."""
    if page is not None and not page.resolve().parent.is_dir():
        raise OutputError(f"{option} {page}: found no directory {page.resolve().parent}; make it first")
    if page is not None and page.is_dir():
        raise OutputError(f"{option} {page}: found a directory: expected the name of a file in it")
