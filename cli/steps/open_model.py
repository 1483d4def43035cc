"""Opening a model, as every run command does: find it, plan the run, load it."""

from pathlib import Path
from typing import TYPE_CHECKING

from cli.terminal.console import Console
from cli.terminal.imports import made_to_stay, seldom_collecting
from cli.terminal.progress import progress_bar
from offload.records import RunOptions

if TYPE_CHECKING:  # it imports torch
    from offload.run.session import Session


def find_model(model: str) -> Path:
    """The directory of ``model``, itself or a Hub id. Raises CheckpointError before torch is imported."""
    from quant.model.hub import resolve_model

    return resolve_model(model)


def open_session(path: Path, run: RunOptions, console: Console, filled: int | None = None) -> "Session":
    """The session of the model in ``path``, its notes said, its speed predicted for ``filled`` tokens in the KV cache.
    Raises ColdstreamError."""
    with seldom_collecting():
        from offload.run.session import Session

    with made_to_stay(), progress_bar(console, "loading", "bytes") as show:
        session = Session.open(path, run, progress=console.step, loading=show, filled=filled)
    console.step(f"loaded in {session.load_seconds:.1f} s, {session.kernel}")
    console.notes([*session.notes, *session.plan.notes])
    if console.verbose:
        from cli.terminal.plan_table import byte_table, speeds

        console.show(byte_table(session.plan))
        console.rows(speeds(session.plan))
    return session
