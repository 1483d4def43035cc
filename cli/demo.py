"""``coldstream demo``: the whole path on the model that ships with the package, telling what it does."""

import tempfile
import time
from contextlib import ExitStack
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.console import Console
from cli.options import Json

Keep = Annotated[
    Path | None,
    typer.Option("--keep", metavar="DIR", file_okay=False, help="Leave model, profile and report page here."),
]

QUESTION = "What does os.path.join do?"
TOKENS = 96
PROFILE_TOKENS = 4096


def demo(keep: Keep = None, json: Json = False) -> None:
    """Quantize, profile, plan, generate and report on the embedded model (9 MB, trained on Python's library)."""
    from quant.errors import OutputError

    console = Console(json=json)
    started = time.perf_counter()
    with ExitStack() as stack:
        if keep is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="coldstream-demo-")))
        else:
            if keep.exists() and any(keep.iterdir()):
                raise OutputError(f"{keep} is not empty: name a new directory for --keep")
            keep.mkdir(parents=True, exist_ok=True)
            folder = keep
        source = stack.enter_context(as_file(files("recipes").joinpath("demo")))
        document = _demo(source, folder, console)
    seconds = time.perf_counter() - started
    console.say(f"\nDone in {seconds:.0f} s." + (f" Everything is in {keep}." if keep else ""))
    console.result({**document, "seconds": seconds, "kept": keep})


def _demo(source: Path, folder: Path, console: Console) -> dict[str, Any]:
    quantized = _quantize(source, folder / "model", console)
    routing = _profile(folder / "model", folder / "routing.json", console)
    plan = _plan(folder, console)
    return {"quantize": quantized, "profile": routing, "plan": plan, **_generate(folder, console)}


def _heading(console: Console, number: int, title: str, command: str) -> None:
    console.say(f"\n{number}. {title}\n   $ coldstream {command}\n")
