"""How a command speaks: the options for JSON, less and more words, and where a report page goes."""

from pathlib import Path
from typing import Annotated

import typer

from cli.options.groups import expands
from cli.options.typed import typed_path
from cli.terminal.console import Console

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document as the last line of stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only the result and errors: no progress, no notes.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="More: seconds passed, what a run was planned as.")]
Report = Annotated[
    Path | None,
    typer.Option("--report", parser=typed_path, metavar="FILE", help="Write the report page (one HTML file) here."),
]


Destination = Annotated[
    Path, typer.Argument(metavar="DST", parser=typed_path, help="A new or empty directory.", show_default=False)
]

takes_console = expands(
    "console", {"json": (Json, False), "quiet": (Quiet, False), "verbose": (Verbose, False)}, Console
)
