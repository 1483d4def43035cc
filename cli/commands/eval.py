"""``coldstream eval``: what quantization cost a model, on a text."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cli.options.output import Report, takes_console
from cli.options.run import Model
from cli.options.typed import typed_path
from cli.terminal.console import Console
from cli.terminal.imports import seldom_collecting
from cli.terminal.progress import progress_bar

if TYPE_CHECKING:
    from offload.quality.evaluate import Evaluation

Reference = Annotated[str, typer.Option("--reference", metavar="SRC", help="The checkpoint that MODEL was made from.")]
Text = Annotated[
    Path, typer.Option("--text", parser=typed_path, metavar="FILE", help="Text that neither was calibrated on.")
]
Windows = Annotated[int, typer.Option("--windows", min=0, metavar="N", help="Windows to run; 0 runs the whole text.")]
Context = Annotated[int, typer.Option("--context", min=2, metavar="TOKENS", help="Tokens of a window.")]
Kv = Annotated[Literal["bf16", "int8"] | None, typer.Option("--kv", help="Store keys and values like this (exact).")]
Cache = Annotated[
    Path | None,
    typer.Option(
        "--cache", parser=typed_path, metavar="DIR", help="Keeps reference predictions (~/.cache/coldstream)."
    ),
]
Image = Annotated[
    list[Path] | None,
    typer.Option(
        "--image", parser=typed_path, metavar="FILE", help="Pictures whose rows are compared, too; may be repeated."
    ),
]
Slots = Annotated[
    int | None, typer.Option("--expert-slots", min=2, metavar="N", help="Experts in memory at once (a layer's).")
]


@takes_console
def eval(
    model: Model,
    reference: Reference,
    text: Text,
    console: Console,
    windows: Windows = 32,
    context: Context = 512,
    kv: Kv = None,
    cache: Cache = None,
    expert_slots: Slots = None,
    image: Image = None,
    report: Report = None,
) -> None:
    """Measure how far MODEL's predictions are from those of the checkpoint it was made from.

    Runs the text through both, a layer at a time. The reference's predictions are kept for next time.
    """
    from cli.steps.finish import check_page, command_line
    from cli.steps.open_model import find_model
    from cli.steps.texts import read_text

    check_page(report)
    path, source = find_model(model), find_model(reference)
    words = read_text(text)
    with seldom_collecting():
        from offload.quality.evaluate import evaluate

    console.step(f"running the text through {reference} and {model}")
    with progress_bar(console, "", "done") as told:
        found = evaluate(
            path,
            source,
            words,
            cache=cache,
            windows=windows or None,
            length=context,
            expert_slots=expert_slots,
            kv=kv,
            images=image or (),
            progress=told,
        )
    notes = [*found.notes, *_beyond(path, context)]
    show_evaluation(found, console)
    console.notes(notes)
    console.result({**found.to_json(), **({"notes": notes} if notes else {})})
    if report is not None:
        from cli.html.document import save_page
        from cli.html.evaluation import render_evaluation

        save_page(render_evaluation(found, command_line=command_line(), notes=notes), report)
        console.step(f"report page written to {report}")


def _beyond(path: Path, context: int) -> list[str]:
    """A note if windows are longer than what the model was made for."""
    from offload.plan.notes import beyond
    from quant.architecture.shape import shape_of
    from quant.model.hub import resolve_config

    return list(beyond(shape_of(resolve_config(str(path))), context))


def show_evaluation(found: "Evaluation", console: Console) -> None:
    """The numbers as tables, and how KL divergence spreads over tokens as bars."""
    from rich.table import Table

    from cli.terminal.words import divergence_rows

    ours = found.divergence
    console.say()
    table = Table(
        title=f"{found.model} beside {found.reference}: {found.windows} x {found.window_tokens} tokens",
        title_justify="left",
    )
    for name in ("", "model", "noise floor (bf16)"):
        table.add_column(name, justify="left" if not name else "right")
    reference = ours.reference_perplexity
    table.add_row("reference perplexity", f"{reference.value:.3f} ± {reference.error:.3f}", "")
    perplexity = f"{ours.perplexity.value:.3f} ± {ours.perplexity.error:.3f}"
    table.add_row("perplexity", perplexity, f"{found.floor['perplexity']:.3f}")
    for row in divergence_rows(found):
        table.add_row(*row)
    console.show(table)
    buckets = Table(title="By how sure the reference was", title_justify="left")
    for name in ("top probability", "tokens", "KL mean", "same top token"):
        buckets.add_column(name, justify="right")
    for bucket in ours.buckets:
        span = f"{bucket.low:g} to {bucket.high:g}"
        buckets.add_row(span, f"{bucket.tokens:,}", f"{bucket.kl_mean:.5f}", f"{bucket.same_top:.2%}")
    console.show(buckets)
    console.say(histogram(ours.histogram, min(50, console.width - 20)))
    shares = ", ".join(f"{layer}: {share:.1%}" for layer, share in found.router_agreement.items())
    console.prose(f"Experts in common by layer: {shares}")
    if found.images is not None:
        seen = found.images
        console.prose(
            f"{seen.rows:,} rows of images: relative error {seen.relative_error:.2%}, cosine {seen.cosine_mean:.5f} in "
            f"the mean and {seen.cosine_min:.5f} at the least"
        )
    console.step(f"done in {found.seconds:.1f} s")


def histogram(counts: Mapping[str, int], width: int = 50) -> str:
    """A bar per half decade of KL divergence."""
    most = max(counts.values()) or 1
    lines = ["Tokens by KL divergence (nats, from):"]
    for edge, count in counts.items():
        if count:
            lines.append(f"  {edge:>5} │{'█' * max(1, round(width * count / most))} {count:,}")
    return "\n".join(lines)
