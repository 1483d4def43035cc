"""``coldstream quantize``: a Hugging Face checkpoint, quantized into a new directory."""

from collections.abc import Mapping
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cli.options.goal import Goal, takes_goal
from cli.options.output import takes_console
from cli.options.run import WITH_WEIGHTS, Routing
from cli.options.schemes import AskedSchemes, takes_schemes
from cli.terminal.console import Console
from cli.terminal.imports import seldom_collecting
from cli.terminal.progress import progress_bar
from quant.errors import UsageError

if TYPE_CHECKING:
    from offload.quality.windows import Windows
    from quant.checkpoint.checkpoint import Checkpoint
    from quant.convert.convert import ConversionReport
    from quant.model.families import Role
    from quant.rounding.imatrix import Imatrix
    from quant.rounding.rounding import Rounder, Rounding
    from quant.scheme import Scheme

_MEASURED = (
    "Error and SQNR compare the stored weights with those of SRC; what that does to the model's answers, "
    "`coldstream eval` tells."
)
_CALIBRATED = (
    " Calibrated weights lie further off: they make up for errors in their inputs, and so bring outputs nearer."
)


@takes_console
@takes_schemes
@takes_goal
def quantize(
    source: Annotated[str, typer.Argument(metavar="SRC", help=f"{WITH_WEIGHTS}.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="A new or empty directory.")],
    stored: AskedSchemes,
    goal: Goal | None,
    console: Console,
    rounding: Annotated[
        Literal["search", "rtn"], typer.Option("--rounding", help="search: the best without data; rtn: plain absmax.")
    ] = "search",
    calibrate: Annotated[
        Path | None, typer.Option("--calibrate", metavar="FILE", help="Round by GPTQ on this text (slower, better).")
    ] = None,
    tune: Annotated[
        int,
        typer.Option(
            "--tune",
            metavar="PASSES",
            min=0,
            max=100,
            help="After GPTQ, tune dense weights by their layer's output (with --calibrate; 6 is good).",
        ),
    ] = 0,
    imatrix: Annotated[
        Path | None,
        typer.Option(
            "--imatrix",
            metavar="FILE",
            help="Round by how strongly this text excites each input channel; or by a matrix that was saved.",
        ),
    ] = None,
    save_imatrix: Annotated[
        Path | None, typer.Option("--save-imatrix", metavar="FILE", help="Keep it for another run.")
    ] = None,
    routing: Routing = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was stopped.")] = False,
) -> None:
    """Quantize the checkpoint SRC into the new directory DST, by a recipe, by hand or within a size.

    What is not named stays as it is in SRC. With --target-bits, --target-size or --fit, every role that is
    neither named by hand nor left out by the recipe gets the bits that it is worth: measured on the text of
    --calibrate or --imatrix, else judged by its weights. DST appears when it is complete; what is under way
    lies in DST.partial and DST.calibration.
    """
    from cli.steps.choose_bits import Evidence, allocate_bits, open_roles
    from cli.steps.finish import check_page
    from cli.terminal.words import schemes_line

    with seldom_collecting():
        from quant.convert.convert import convert, open_source
    from quant.checkpoint.staging import Staging
    from quant.model.hub import resolve_model

    if calibrate is not None and imatrix is not None:
        raise UsageError("--calibrate already weighs inputs, and more exactly than --imatrix: give one of them")
    if tune and calibrate is None:
        raise UsageError("--tune goes on from GPTQ: give the text with --calibrate as well")
    if save_imatrix is not None and imatrix is None:
        raise UsageError("--save-imatrix has nothing to save: give the text with --imatrix")
    if routing is not None and goal is None:
        raise UsageError(
            "--routing says which experts are worth more bits: give it with --target-bits, --target-size or --fit"
        )
    check_page(save_imatrix, "--save-imatrix")
    schemes: Mapping[Role, Scheme] = {}
    if goal is None:
        schemes = stored.schemes()
    path = resolve_model(source)
    checkpoint, work = open_source(path), _work_folder(destination)
    Staging(destination).check(checkpoint.path, resume)  # now, not after hours of measuring
    weights = _imatrix(checkpoint, imatrix, save_imatrix, console)
    windows = _windows(path, calibrate or (imatrix if _is_text(imatrix) else None))
    if calibrate is not None and windows is not None:
        from offload.plan.footprint import check_calibration

        check_calibration(checkpoint.shape, windows.tokens)
    plain = _plain(checkpoint, rounding, weights)
    chosen: dict[str, Any] = {}
    if goal is not None:
        roles, fixed = open_roles(stored, measured=windows is not None)
        evidence = Evidence(plain, windows, weights, routing)
        schemes, allocation = allocate_bits(
            checkpoint, goal, roles, fixed, evidence, work / "sensitivity.json", resume, console
        )
        chosen = {"allocation": allocation.to_json()}
    named = schemes_line(schemes, checkpoint.shape)
    mostly = "mostly " if goal is not None else ""
    console.step(f"quantizing {path} to {destination}: {mostly}{named}")
    rounder = plain
    if calibrate is not None and windows is not None:
        rounder = _calibrated(checkpoint, work, schemes, windows, plain, tune, resume, console)
    with progress_bar(console, "quantizing", "bytes") as show:
        report = convert(path, destination, schemes, resume=resume, progress=show, rounder=rounder, details=chosen)
    if calibrate is not None or goal is not None:
        rmtree(work, ignore_errors=True)
    console.notes(report.notes)
    _show(console, report, calibrate is not None)
    console.result(report.to_json() | chosen)


def _work_folder(destination: Path) -> Path:
    return destination.with_name(destination.name + ".calibration")


def _is_text(imatrix: Path | None) -> bool:
    return imatrix is not None and imatrix.suffix != ".safetensors"


def _windows(path: Path, text: Path | None) -> "Windows | None":
    """The text in whole windows. Raises UsageError if it cannot be read or is too short."""
    if text is None:
        return None
    from cli.steps.texts import read_text
    from offload.model.tokenizer import load_tokenizer
    from offload.plan.footprint import CALIBRATION_WINDOW
    from offload.quality.windows import Windows

    return Windows.cut(read_text(text), load_tokenizer(path), CALIBRATION_WINDOW)


def _imatrix(checkpoint: "Checkpoint", file: Path | None, save: Path | None, console: Console) -> "Imatrix | None":
    """The importance matrix of the text in ``file``, or the one that lies there."""
    if file is None:
        return None
    from quant.rounding.imatrix import Imatrix

    if not _is_text(file):
        return Imatrix.load(file, checkpoint.identity)
    from offload.quality.importance import measure_importance

    windows = _windows(checkpoint.path, file)
    assert windows is not None
    console.step(f"measuring inputs on {windows.tokens:,} tokens")
    with progress_bar(console, "measuring inputs", "layers") as show:
        found = measure_importance(checkpoint, windows, show)
    if save is not None:
        found.save(save)
    return found


def _plain(checkpoint: "Checkpoint", rounding: "Rounding", imatrix: "Imatrix | None") -> "Rounder":
    """How values are found where no calibration has found them."""
    from quant.rounding.rounding import make_rounder

    if imatrix is None:
        return make_rounder(rounding, checkpoint)
    from quant.rounding.imatrix import Weighted

    return Weighted(imatrix, make_rounder(rounding, checkpoint))


def _calibrated(
    checkpoint: "Checkpoint",
    folder: Path,
    schemes: "Mapping[Role, Scheme]",
    windows: "Windows",
    other: "Rounder",
    passes: int,
    resume: bool,
    console: Console,
) -> "Rounder":
    """Round every layer by the text, into ``folder``."""
    from offload.plan.footprint import calibration_nbytes
    from offload.quality.calibrate import calibrate
    from quant.rounding.prepared import Prepared
    from quant.sizes import format_size

    parts = calibration_nbytes(checkpoint.shape, windows.tokens, tuned=passes > 0)
    named = ", ".join(f"{name} {format_size(nbytes)}" for name, nbytes in parts.items())
    console.step(
        f"calibrating on {windows.tokens:,} tokens; takes about {format_size(sum(parts.values()))} of memory ({named})"
    )

    with progress_bar(console, "calibrating", "layers") as show:
        seen = calibrate(checkpoint, schemes, windows, folder, passes=passes, resume=resume, progress=show)
    console.step(f"calibrated {checkpoint.shape.num_layers} layers")
    console.notes(seen.notes())
    name = f"gptq {windows.identity}" + (f", tuned in {passes} passes" if passes else "")
    return Prepared(folder, name, other)


def _show(console: Console, report: "ConversionReport", calibrated: bool) -> None:
    from rich.table import Table

    from cli.terminal.words import role_name
    from quant.sizes import format_size

    table = Table(box=None, pad_edge=False)
    for name in ("weights of", "scheme", "tensors", "relative error", "SQNR", "worst"):
        left = name in ("weights of", "scheme")
        table.add_column(name, justify="left" if left else "right", overflow="fold")
    for role in report.roles:
        table.add_row(
            role_name(role.role),
            role.scheme,
            f"{role.tensors:,}",
            f"{role.relative_error:.2%}",
            _decibels(role.sqnr_db),
            _decibels(role.worst.sqnr_db),
        )
    if report.roles:
        console.show(table)
        for role in report.roles:
            console.say(f"worst of the {role_name(role.role)}: {role.worst.module}")
        console.prose(_MEASURED + (_CALIBRATED if calibrated else ""))
    console.step(
        f"{format_size(report.source_bytes)} became {format_size(report.output_bytes)} in "
        f"{report.seconds:.1f} s, {report.mb_per_s:,.0f} MB/s, {report.bits_per_weight:.2f} bits per weight "
        f"of the whole checkpoint: {report.path}"
    )


def _decibels(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f} dB"
