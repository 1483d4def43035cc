"""``coldstream check``: whether another engine can load a directory that ``quantize`` wrote."""

from pathlib import Path
from typing import Annotated

import typer

from cli.options.engine import Engine
from cli.options.output import takes_console
from cli.options.typed import typed_path
from cli.terminal.console import Console

Folder = Annotated[
    Path, typer.Argument(metavar="DIR", parser=typed_path, help="A model directory.", show_default=False)
]


@takes_console
def check(console: Console, directory: Folder, engine: Engine) -> None:
    """Hold the model directory DIR against what another engine loads, by its headers alone.

    Says what keeps it from being loaded, a line each, and fails if anything does. What the engine would load and
    compute wrongly counts.
    """
    from cli.terminal.words import schemes_line
    from quant.checkpoint.engines import ENGINES, obstacles
    from quant.checkpoint.inventory import open_headers, schemes_of_tensors
    from quant.errors import CheckpointError

    headers, known = open_headers(directory), ENGINES[engine]
    schemes = schemes_of_tensors(headers)
    found = obstacles(headers.shape, schemes, known)
    for line in found:
        console.prose(line)
    if found:
        more = f", and {len(found) - 1} more" if len(found) > 1 else ""
        raise CheckpointError(f"{known.title} cannot load {directory}: {found[0]}{more}")
    console.prose(f"{known.title} loads {directory}: {schemes_line(schemes, headers.shape)}")
    console.result({"model": str(directory), "engine": known.title, "loads": True})
