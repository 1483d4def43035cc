"""``coldstream quantize``: a Hugging Face checkpoint, quantized into a new directory."""

from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cli import options
from cli.console import Console
from cli.schemes import Attention, DenseMlp, Experts, GroupSize, LmHead, SharedExpert, chosen_schemes

if TYPE_CHECKING:
    from quant.convert import ConversionReport
    from quant.families import Role
    from quant.rounding import Rounder
    from quant.scheme import Scheme

_CALIBRATION_WINDOW = 512


def quantize(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A model directory or a Hub id.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="A new or empty directory.")],
    recipe: options.Recipe = None,
    experts: Experts = None,
    shared_expert: SharedExpert = None,
    dense_mlp: DenseMlp = None,
    attention: Attention = None,
    lm_head: LmHead = None,
    group_size: GroupSize = 128,
    rounding: Annotated[
        Literal["search", "rtn"],
        typer.Option("--rounding", help="search: best scale of each group, for int4; rtn: plain absmax."),
    ] = "search",
    calibrate: Annotated[
        Path | None,
        typer.Option("--calibrate", metavar="FILE", help="Round by GPTQ on this text (slower, better)."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was stopped.")] = False,
    json: options.Json = False,
) -> None:
    """Quantize the checkpoint SRC into the new directory DST, by a recipe or by hand.

    What is not named stays as it is in SRC. DST appears when it is complete; what is under way lies in
    DST.partial.
    """
    from quant.convert import convert
    from quant.hub import resolve_model

    by_hand: dict[Role, str | None] = {
        "experts": experts, "shared_expert": shared_expert, "dense_mlp": dense_mlp, "attention": attention,
        "lm_head": lm_head,
    }  # fmt: skip
    schemes = chosen_schemes(recipe, by_hand, group_size)
    console = Console(json=json)
    path = resolve_model(source)
    named = ", ".join(f"{role} {scheme}" for role, scheme in schemes.items())
    console.step(f"quantizing {path} to {destination}: {named}")
    rounder = None
    if calibrate is not None:
        rounder = _calibrated(path, destination, schemes, calibrate, resume, console)
    with console.progress() as bar:
        task = bar.add_task("quantize", total=None)

        def show(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total)

        report = convert(
            path, destination, schemes, resume=resume, progress=show, rounding=rounding, rounder=rounder
        )
    if calibrate is not None:
        rmtree(_work_folder(destination), ignore_errors=True)
    console.notes(report.notes)
    _show(console, report)
    console.result(report.to_json())


def _work_folder(destination: Path) -> Path:
    return destination.with_name(destination.name + ".calibration")


def _calibrated(
    path: Path, destination: Path, schemes: "dict[Role, Scheme]", file: Path, resume: bool, console: Console
) -> "Rounder":
    """Round every layer by the text in ``file``, into a folder beside ``destination``."""
    from cli.texts import read_text
    from offload.calibrate import calibrate, memory_nbytes
    from offload.session import load_tokenizer
    from offload.windows import Windows
    from quant.checkpoint import Checkpoint
    from quant.prepared import Prepared
    from quant.rounding import make_rounder
    from quant.sizes import format_size

    checkpoint, folder = Checkpoint.open(path), _work_folder(destination)
    windows = Windows.cut(read_text(file), load_tokenizer(path), _CALIBRATION_WINDOW)
    console.step(
        f"calibrating on {windows.tokens:,} tokens; takes about "
        f"{format_size(memory_nbytes(checkpoint, windows.tokens))} of memory beside the dense weights"
    )

    def show(done: int, total: int, left: float) -> None:
        console.step(f"calibrated layer {done} of {total}, about {left / 60:.0f} min left")

    seen = calibrate(checkpoint, schemes, windows, folder, resume=resume, progress=show)
    console.notes(seen.notes())
    return Prepared(folder, f"gptq {windows.identity}", make_rounder("search", checkpoint))


def _show(console: Console, report: "ConversionReport") -> None:
    from rich.table import Table

    from quant.sizes import format_size

    table = Table(box=None, pad_edge=False)
    columns: list[tuple[str, Any]] = [
        ("role", "left"), ("scheme", "left"), ("tensors", "right"), ("relative error", "right"),
        ("SQNR", "right"), ("worst tensor", "left"),
    ]  # fmt: skip
    for name, side in columns:
        table.add_column(name, justify=side)
    for role in report.roles:
        worst = f"{role.worst.module} ({_decibels(role.worst.sqnr_db)})"
        table.add_row(
            role.role, str(role.scheme), f"{role.tensors:,}", f"{role.relative_error:.2%}",
            _decibels(role.sqnr_db), worst,
        )  # fmt: skip
    if report.roles:
        console.show(table)
    console.step(
        f"{format_size(report.source_bytes)} became {format_size(report.output_bytes)} "
        f"({report.bits_per_weight:.2f} bits per weight) in {report.seconds:.1f} s, {report.mb_per_s:,.0f} "
        "MB/s: "
        f"{report.path}"
    )


def _decibels(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f} dB"
