"""``coldstream quantize``: a Hugging Face checkpoint, quantized into a new directory."""

from collections.abc import Mapping
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options.engine import EngineName, ForEngine
from cli.options.goal import Goal, takes_goal
from cli.options.output import Destination, takes_console
from cli.options.rounding import AskedRounding, takes_rounding
from cli.options.run import WITH_WEIGHTS, Routing
from cli.options.schemes import AskedSchemes, takes_schemes
from cli.options.typed import typed_path
from cli.terminal.console import Console
from cli.terminal.imports import seldom_collecting
from cli.terminal.progress import progress_bar
from quant.errors import ProfileError, RecipeError, UsageError
from quant.scheme import LEAST_BITS

if TYPE_CHECKING:
    from cli.steps.find_values import Values
    from quant.checkpoint.checkpoint import Checkpoint
    from quant.convert.convert import ConversionReport
    from quant.destination.staging import Staging
    from quant.model.families import Role
    from quant.scheme import Scheme

_OUTPUTS = ("calibrated", "alone")
_MEASURED = (
    "Relative error and SQNR compare the stored weights with those of SRC; what that does to the model's answers, "
    "`coldstream eval` tells."
)
_CALIBRATED = (
    "Output error is how far the products of these weights with the text's inputs are off, beside how far the best "
    "scales without the text would be. For it the weights themselves lie further off. "
)

_NO_TEXT = (
    "a text is measured by running SRC, which is quantized itself: give --calibrate and --imatrix a source whose "
    "weights are in floating point"
)

_REPACK = "--repack takes what SRC has: it goes without schemes, recipes, goals and texts"


@takes_console
@takes_schemes
@takes_goal
@takes_rounding
def quantize(
    source: Annotated[str, typer.Argument(metavar="SRC", help=f"{WITH_WEIGHTS}.")],
    destination: Destination,
    stored: AskedSchemes,
    goal: Goal | None,
    asked: AskedRounding,
    console: Console,
    routing: Routing = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            "--tokenizer",
            parser=typed_path,
            metavar="DIR",
            help="Where the tokenizer and config.json are that a GGUF file lacks.",
        ),
    ] = None,
    engine: ForEngine = None,
    repack: Annotated[
        bool, typer.Option("--repack", help="Keep the symmetric int4 or int8 that SRC has, in the layout that runs.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was stopped.")] = False,
) -> None:
    """Quantize the checkpoint SRC into the new directory DST, by a recipe, by hand or within a size.

    What is not named stays as it is in SRC. With --target-bits, --target-size or --fit, every role that is
    neither named by hand nor left out by the recipe gets the bits that it is worth: measured on the text of
    --calibrate or --imatrix, else judged by its weights. DST appears when it is complete; what is under way
    lies in DST.partial, or in DST/.partial where DST is there already.
    """
    from cli.steps.choose_bits import BitChoice, open_roles
    from cli.steps.find_values import Values
    from cli.terminal.words import schemes_line
    from quant.output_file import check_output

    with seldom_collecting():
        from quant.convert.convert import convert, job_of, made_before
    from quant.checkpoint.config_groups import check_schemes
    from quant.destination.staging import Staging
    from quant.model.hub import is_hub_id, resolve_model
    from quant.rounding.imatrix import MARK
    from quant.rounding.repack import Repacked, own_schemes
    from quant.sources.checkpoint import SourceCheckpoint
    from quant.sources.open import is_gguf, open_source

    if routing is not None and goal is None:
        raise UsageError(
            "--routing says which experts are worth more bits: give it with --target-bits, --target-size or --fit"
        )
    check_output(asked.save_imatrix, "--save-imatrix", MARK)
    if repack and (goal is not None or stored != AskedSchemes() or asked.text is not None or asked.imatrix is not None):
        raise UsageError(_REPACK)
    # What is here is looked at before the schemes; what is to be downloaded, after them.
    path = Path(source) if is_gguf(source) else None if is_hub_id(source) else resolve_model(source)
    schemes: Mapping[Role, Scheme] = {} if goal is not None or repack else stored.schemes()  # refused before a download
    path = path or resolve_model(source)
    checkpoint = open_source(path, tokenizer)
    if isinstance(checkpoint, SourceCheckpoint):
        console.step(f"{path} has {checkpoint.forms}")
        if asked.text is not None:
            raise UsageError(_NO_TEXT)
    if repack:
        schemes = own_schemes(checkpoint)
    elif goal is None:
        schemes = stored.schemes_of(checkpoint.shape)
    roles: list[Role] = []
    fixed: Mapping[Role, Scheme] = {}
    if goal is None:
        console.notes(check_schemes(checkpoint.shape, schemes))
        _check_engine(checkpoint, schemes, engine)
    with Staging(destination) as staging:
        if not (resume and staging.is_published):
            _claim(staging, checkpoint, resume)
        values = Values.read(checkpoint, asked)
        aim: dict[str, Any] = {}
        if goal is not None:
            roles, fixed = open_roles(stored, measured=values.windows is not None)
            aim = {"goal": _described(goal, roles, fixed, routing)}
        job = job_of(checkpoint, Repacked.name if repack else values.name, schemes if goal is None else None) | aim
        if resume and staging.is_published:
            if (made := made_before(staging, job)) is not None:
                console.step(f"already complete: {staging.destination}")
                if asked.save_imatrix is not None:
                    console.notes(["nothing was measured, so --save-imatrix has nothing to save"])
                console.result(made.to_json() | dict(made.details))
                return
            _claim(staging, checkpoint, resume)
        _check_space(staging, values, schemes, roles, LEAST_BITS if goal is None else goal.least_bits)
        plain = values.rounder(console)
        if repack:
            plain = Repacked(checkpoint, plain)
        chosen: dict[str, Any] = {}
        if goal is not None:
            evidence = (plain, values.windows, values.imatrix, routing)
            choice = BitChoice(checkpoint, goal, fixed, *evidence, staging.work, job, resume, console)
            schemes, allocation = choice.make(roles)
            chosen = {"allocation": allocation.to_json()}
            console.notes(check_schemes(checkpoint.shape, schemes))
            _check_engine(checkpoint, schemes, engine)
        named = schemes_line(schemes, checkpoint.shape)
        console.step(f"quantizing {path} to {destination}: {named}")
        rounder = plain
        if asked.calibrate is not None:
            rounder = values.calibrated(schemes, plain, staging.work, resume, console)
            chosen["output_errors"] = values.output_errors
        with progress_bar(console, "quantizing", "bytes") as show:
            report = convert(
                checkpoint, staging, schemes, resume=resume, progress=show, rounder=rounder, details=chosen | aim
            )
    console.notes(report.notes)
    _show(console, report, values.output_errors)
    console.result(report.to_json() | chosen)


def _claim(staging: "Staging", checkpoint: "Checkpoint", resume: bool) -> None:
    """Make sure that the destination can be written before anything is read, let alone measured."""
    staging.check(checkpoint.path, resume)
    staging.claim()


def _check_engine(checkpoint: "Checkpoint", schemes: "Mapping[Role, Scheme]", engine: EngineName | None) -> None:
    """Refuse to write what ``engine``, if one is named, could not load."""
    from quant.checkpoint.engines import ENGINES, obstacles

    found = [] if engine is None else obstacles(checkpoint.shape, schemes, ENGINES[engine])
    if engine is not None and found:
        raise RecipeError(f"{ENGINES[engine].title} could not load the result: {'; '.join(found)}")


def _described(goal: Goal, roles: "list[Role]", fixed: "Mapping[Role, Scheme]", routing: Path | None) -> dict[str, Any]:
    """What two runs with a goal must share for one to continue the other, before any bits are chosen."""
    from quant.input_file import read_bytes

    profile = None if routing is None else sha256(read_bytes(routing, ProfileError)).hexdigest()[:16]
    named = {role: str(scheme) for role, scheme in fixed.items()}
    return {**asdict(goal), "roles": list(roles), "fixed": named, "routing": profile}


def _check_space(
    staging: "Staging", values: "Values", schemes: "Mapping[Role, Scheme]", roles: "list[Role]", least_bits: int
) -> None:
    """Refuse a file system that lacks room for the result, or for what a calibration keeps until then."""
    from quant.allocation.units import units_of
    from quant.convert.convert import check_space
    from quant.convert.parts import plan_conversion
    from quant.destination.writer import check_free

    shape = values.checkpoint.shape
    beside = 0
    if values.asked.calibrate is not None and values.windows is not None:
        streams = 2 * 2 * 4 * values.windows.tokens * shape.hidden_size  # of two layers, two each, in f32
        beside = streams
    if roles:
        units = units_of(shape, roles, least_bits=least_bits)
        least = sum(min(unit.nbytes(scheme) for scheme in unit.candidates()) for unit in units)
        check_free(staging.nearest, beside + least * (2 if beside else 1) - staging.nbytes)
    else:
        conversion = plan_conversion(values.checkpoint, schemes)
        check_space(values.checkpoint, conversion, staging, beside + (conversion.layout.nbytes if beside else 0))


def _show(console: Console, report: "ConversionReport", outputs: "Mapping[Role, Mapping[str, float]]") -> None:
    from cli.terminal.plain_table import plain_table
    from offload.tiers import role_name
    from quant.sizes import format_size

    beside = ("output error", "without the text") if outputs else ()
    headings = ("weights of", "scheme", "tensors", *beside, "relative error", "SQNR", "worst")
    table = plain_table(*headings, words=2)
    for role in report.roles:
        table.add_row(
            role_name(role.role),
            role.scheme,
            f"{role.tensors:,}",
            *(f"{outputs[role.role][key]:.2%}" if role.role in outputs else "" for key in _OUTPUTS[: len(beside)]),
            f"{role.relative_error:.2%}",
            _decibels(role.sqnr_db),
            _decibels(role.worst.sqnr_db),
        )
    if report.roles:
        console.show(table)
        for role in report.roles:
            console.prose(f"worst of the {role_name(role.role)}: {role.worst.module}")
        console.prose((_CALIBRATED if outputs else "") + _MEASURED)
    console.step(
        f"{format_size(report.source_bytes)} became {format_size(report.output_bytes)} in "
        f"{report.seconds:.1f} s, {report.mb_per_s:,.0f} MB/s, {report.bits_per_weight:.2f} bits per weight "
        f"of the whole checkpoint: {report.path}"
    )


def _decibels(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f} dB"
