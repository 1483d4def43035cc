"""``coldstream plan``: where every byte goes, how fast it runs, what limits it. Needs neither weights nor
torch."""

from collections.abc import Mapping
from dataclasses import replace
from os.path import lexists
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options.machine import AskedMachine, takes_machine
from cli.options.output import takes_console
from cli.options.run import ModelOrShape, Routing, takes_budgets
from cli.options.schemes import AskedSchemes, takes_schemes
from cli.options.typed import typed_path
from cli.terminal.console import Console
from offload.records import RunOptions

if TYPE_CHECKING:
    from offload.plan.planned_run import PlannedModel, PlannedRun
    from quant.model.shape import ModelShape

Calibrate = Annotated[
    Path | None,
    typer.Option(
        "--calibrate", parser=typed_path, metavar="FILE", help="Say what `quantize --calibrate FILE` takes of memory."
    ),
]
_REPLAYED = 32  # tokens
_BYTES_PER_TOKEN = 4


@takes_console
@takes_schemes
@takes_budgets
@takes_machine
def plan(
    model: ModelOrShape,
    stored: AskedSchemes,
    target: AskedMachine,
    console: Console,
    options: RunOptions,
    routing: Routing = None,
    calibrate: Calibrate = None,
) -> None:
    """Say where every byte of a run of MODEL goes, what speed to expect, what limits it, and what a GiB
    more buys; how long a context may be, and what a longer one costs.

    A quantized MODEL is planned as it is, with the defaults for a run of --recipe. Otherwise --recipe, and of
    any MODEL schemes by hand, say what it will be stored as; a shape without either takes the recipe of its
    name, or `fast`.
    """
    from cli.steps.plan_run import plan_run
    from cli.terminal.plan_table import caution
    from cli.terminal.words import number
    from offload.simulator.simulation import Simulation

    run = plan_run(model, stored, target, replace(options, routing=routing), console, curve=True)
    made, shape, schemes = run.plan, run.model.shape, run.model.schemes
    replay = Simulation.of(shape, schemes, made, run.machine, run.model.wider)
    decode, prefill = replay.decode(_REPLAYED), replay.prefill()
    notes, files = (*run.machine.notes, *made.notes), file_bytes(run.model)
    calibration = _calibration(model, calibrate, shape) if calibrate is not None else None
    if not console.json:
        _show(console, model, run)
        replayed = (
            f"{number(decode.tokens_per_s)} tokens/s, prefill {number(prefill.tokens_per_s)}: the same run event by "
            "event; its waits make it slower than the arithmetic above, its overlaps faster (coldstream simulate)"
        )
        console.rows([("replayed", replayed), *_files(run.model), *caution(run.machine)])
        if calibration is not None:
            _show_calibration(console, calibration)
        console.notes(notes)
    console.result(
        {
            **made.to_json(),
            "replayed": {"decode": decode.to_json(), "prefill": prefill.to_json()},
            "model": model,
            "schemes": {role: str(scheme) for role, scheme in schemes.items()},
            "machine": run.machine.to_json(),
            "files": files,
            "notes": notes,
            **({"calibration": calibration} if calibration else {}),
        }
    )


def _calibration(model: str, text: Path, shape: "ModelShape") -> dict[str, Any]:
    """Tokens of the text, and the bytes that calibrating on it takes. Without the model's tokenizer a token
    is taken for four bytes. Raises InputError for a text too short to calibrate on, as quantize does."""
    from cli.steps.texts import read_text
    from offload.plan.footprint import CALIBRATION_WINDOW, calibration_nbytes, check_calibration
    from offload.text.tokenizer_files import TOKENIZER, TokenizersErrors, check_tokenizer_files, plain_tokenizer

    words, counted = read_text(text), lexists(Path(model) / TOKENIZER)
    if counted:
        check_tokenizer_files(Path(model))
        with TokenizersErrors("the text cannot be read"):
            tokens = len(plain_tokenizer(Path(model)).encode(words).ids)
    else:
        tokens = len(words.encode()) // _BYTES_PER_TOKEN
    check_calibration(shape, tokens // CALIBRATION_WINDOW * CALIBRATION_WINDOW, counted=counted)
    parts = calibration_nbytes(shape, tokens)
    tuning = calibration_nbytes(shape, tokens, tuned=True)["tuning"]
    return {
        "tokens": tokens,
        "tokens_counted": counted,
        "bytes": parts,
        "total_bytes": sum(parts.values()),
        "tuning_bytes": tuning,
    }


def _show_calibration(console: Console, found: Mapping[str, Any]) -> None:
    from cli.terminal.words import size

    parts = ", ".join(f"{name} {size(nbytes)}" for name, nbytes in found["bytes"].items())
    about = "" if found["tokens_counted"] else "about "
    text = f"{size(found['total_bytes'])} of RAM for {about}{found['tokens']:,} tokens: {parts}; "
    console.rows([("calibrate", f"{text}{size(found['tuning_bytes'])} more with --tune")])


def file_bytes(model: "PlannedModel") -> dict[str, int | None]:
    """Bytes of the quantized checkpoint, and of what it is made from (None where nothing is): what is there, or
    the bf16 checkpoint to be downloaded."""
    stored = model.file_nbytes
    source = None if model.is_stored else model.source_nbytes or sum(model.shape.role_nbytes({}).values())
    return {"source": source, "stored": stored, "converting": None if source is None else source + stored}


def _files(model: "PlannedModel") -> list[tuple[str, str]]:
    from cli.terminal.words import size

    found = file_bytes(model)
    stored, source = found["stored"] or 0, found["source"]
    if source is None:
        return [("files", f"{size(stored)} on disk")]
    both = f"{size(source + stored)} on disk while converting"
    first = "on disk now" if model.source_nbytes is not None else "to download (bf16)"
    return [("files", f"{size(source)} {first}, {both}, {size(stored)} after")]


def _weights(shape: "ModelShape") -> str:
    roles = shape.role_nbytes({})
    total, routed = sum(roles.values()) / 2, roles["experts"] / 2
    active = total - routed * (1 - shape.top_k / (shape.num_experts or 1)) - roles.get("vision", 0) / 2
    if not shape.moe_layers:
        return f"{_billions(total)} weights in {shape.num_layers} layers, no experts"
    layers = f"{len(shape.moe_layers)} MoE layers of {shape.num_experts} experts, top-{shape.top_k}"
    return f"{_billions(total)} weights, {_billions(active)} per token; {layers}"


def _billions(count: float) -> str:
    return f"{count / 1e9:,.0f}B" if count >= 1e10 else f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def _show(console: Console, model: str, run: "PlannedRun") -> None:
    from cli.steps.plan_run import stored_as
    from cli.terminal.plan_table import advice, byte_table, contexts, machine_line, speeds

    console.prose(f"{model}: {_weights(run.model.shape)}")
    console.prose(stored_as(run.model))
    console.prose(machine_line(run.machine))
    console.say()
    console.show(byte_table(run.plan))
    console.say()
    console.rows([*speeds(run.plan), *contexts(run.plan), *advice(run.plan)])
