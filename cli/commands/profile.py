"""``coldstream profile``: run text through a model and save which experts it routes to."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options.output import takes_console
from cli.options.run import Model, takes_run_options
from cli.options.typed import typed_path
from cli.terminal.console import Console
from cli.terminal.progress import progress_bar
from offload.records import RunOptions

if TYPE_CHECKING:
    from offload.routing.stats import RoutingStats
    from offload.run.session import Session

Text = Annotated[
    list[Path] | None,
    typer.Option("--text", parser=typed_path, metavar="FILE", help="Text to run; may be given again, - is stdin."),
]
Image = Annotated[
    list[Path] | None,
    typer.Option(
        "--image",
        parser=typed_path,
        metavar="FILE",
        help="An image to run, counted apart, too; may be given again. An image, a text or both must be given.",
    ),
]
Out = Annotated[Path, typer.Option("--out", parser=typed_path, metavar="FILE", help="Where the profile goes.")]
Merge = Annotated[
    list[Path] | None,
    typer.Option(
        "--merge", parser=typed_path, metavar="FILE", help="Add this profile of the same model; may be given again."
    ),
]
Tokens = Annotated[int | None, typer.Option("--tokens", min=1, metavar="N", help="Stop after this many tokens.")]
Trace = Annotated[bool, typer.Option("--trace", help="Keep the order of requests too, for simulate and rank-policies.")]


@takes_console
@takes_run_options
def profile(
    model: Model,
    run: RunOptions,
    console: Console,
    text: Text = None,
    image: Image = None,
    out: Out = Path("routing.json"),
    merge: Merge = None,
    tokens: Tokens = None,
    trace: Trace = False,
) -> None:
    """Run text and images through MODEL and save its routing: counts and reuse distances.

    The profile seeds placement in later runs (--routing) and is refused by any other model.
    """
    from cli.steps.open_model import find_model, open_session
    from cli.steps.texts import read_text
    from offload.routing.trace import PROFILE_MARK
    from quant.output_file import check_output

    check_output(out, "--out", PROFILE_MARK)
    path = find_model(model)
    from offload.routing.stats import RoutingStats
    from quant.architecture.shape import shape_of
    from quant.errors import UsageError
    from quant.model.hub import resolve_config

    if not text and not image:
        raise UsageError("there is nothing to run: expected --text FILE, --image FILE, or both")
    source = "\n".join(read_text(file) for file in text or ())
    shape = shape_of(resolve_config(str(path)))
    if not shape.moe_layers:
        raise UsageError(f"a {shape.family.name} model without experts routes nothing: there is no profile to take")
    others = [RoutingStats.load(file, shape) for file in merge or ()]
    with open_session(path, replace(run, images=bool(image)), console) as session:
        for other in others:
            other.check(session.routing.model_id)
        stats = session.routing
        if trace or image:
            stats.trace = []
        seconds = run_text(session, source, tokens, console) if text else 0.0
        seconds += run_images(session, image or (), console)
        seen, seen_images = stats.tokens, stats.image_tokens
        if not trace:
            stats.trace = None
        for other in others:
            stats.merge(other)
        stats.save(out)
        console.say()
        show_routing(stats, console)
        of_images = f", {seen_images:,} of them of images" if seen_images else ""
        console.step(
            f"{seen:,} tokens{of_images} in {seconds:.1f} s; profile of {stats.tokens:,} tokens written to {out}"
        )
        console.result(profile_document(stats, out, seen, seconds))


def run_text(session: "Session", text: str, limit: int | None, console: Console) -> float:
    """Run ``text`` through the model in pieces as long as its context; returns the seconds it took."""
    import time

    from quant.errors import InputError

    if not text.strip():
        raise InputError("there is no text to run: the files given are empty")
    ids = session.encode(text)[:limit]
    window = session.context
    started = time.perf_counter()
    with progress_bar(console, "running the text", "tokens") as show:
        show(0, len(ids), "")
        for start in range(0, len(ids), window):
            session.reset()
            session.prefill(ids[start : start + window])
            show(min(start + window, len(ids)), len(ids), "")
    session.reset()
    return time.perf_counter() - started


def run_images(session: "Session", images: Sequence[Path], console: Console) -> float:
    """Run each image as a prompt of its own, and count what its rows ask for; returns the seconds it took. The
    session's routing keeps a trace."""
    import time

    import numpy as np

    stats, started = session.routing, time.perf_counter()
    with progress_bar(console, "running the images", "images") as show:
        for number, file in enumerate(images, 1):
            ids = np.array(session.encode("", [file]))
            before = stats.tokens
            session.reset()
            session.prefill(ids.tolist())
            new = stats.tokens - before
            assert stats.trace is not None
            seen = np.concatenate(stats.trace)[-new:]  # what the cache holds of the prompt's beginning is not run
            stats.count_images(seen[ids[-new:] >= session.shape.vocab_size])
            show(number, len(images), "")
    session.reset()
    return time.perf_counter() - started


def profile_document(stats: "RoutingStats", out: Path, seen: int, seconds: float) -> dict[str, object]:
    """What ``--json`` prints."""
    return {
        "out": out,
        "model_id": stats.model_id,
        "tokens": stats.tokens,
        "tokens_run": seen,
        "image_tokens": stats.image_tokens,
        "image_overlap": stats.image_overlap(),
        "seconds": seconds,
        "moe_layers": stats.moe_layers,
        "num_experts": stats.num_experts,
        "top_k": stats.top_k,
        "skew": stats.skew(),
    }


def show_routing(stats: "RoutingStats", console: Console) -> None:
    """Skew by layer as a table, and use as a heat map of layers by experts."""
    import math

    from rich.table import Table

    uniform = math.log2(stats.num_experts)
    table = Table(title=f"Share of requests to the most used experts ({stats.tokens:,} tokens)")
    for name in ("layer", "top 10 %", "top 25 %", "top 50 %", f"entropy (of {uniform:.2f} bits)"):
        table.add_column(name, justify="right")
    overlaps = stats.image_overlap()
    if overlaps:
        table.add_column("images alike", justify="right")
    for index, skew in enumerate(stats.skew()):
        shares = [f"{100 * share:.1f} %" for share in (skew.top10, skew.top25, skew.top50)]
        alike = [f"{100 * overlaps[index]:.1f} %"] if overlaps else []
        table.add_row(str(skew.layer), *shares, f"{skew.entropy:.2f}", *alike)
    console.show(table)
    console.say(heat_map(stats, min(128, console.width - 8) if console.rich.is_terminal else 128))


def heat_map(stats: "RoutingStats", width: int = 128) -> str:
    """Layers down, experts across, a character each (or for several, past ``width``); dark is much used."""
    shades = " ░▒▓█"
    group = -(-stats.num_experts // width)
    lines = ["Use of each expert (layers down, experts across):"]
    for layer, row in zip(stats.moe_layers, stats.counts, strict=True):
        cells = [int(row[start : start + group].sum()) for start in range(0, stats.num_experts, group)]
        most = max(cells) or 1
        drawn = "".join(
            shades[0] if not cell else shades[min(1 + (len(shades) - 1) * cell // (most + 1), len(shades) - 1)]
            for cell in cells
        )
        lines.append(f"{layer:>5} │{drawn}│")
    return "\n".join(lines)
