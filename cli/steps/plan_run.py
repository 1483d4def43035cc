"""A run as the command line describes it, planned: model, what it is stored as, machine and options."""

from pathlib import Path

from cli.options.machine import AskedMachine
from cli.options.schemes import AskedSchemes
from cli.terminal.console import Console
from cli.terminal.words import schemes_line
from offload.plan.planned_run import PlannedModel, PlannedRun, planned_model, planned_run
from offload.records import RunOptions


def plan_run(
    model: str,
    stored: AskedSchemes,
    target: AskedMachine,
    options: RunOptions,
    console: Console,
    prompt: int | None = None,
    curve: bool = False,
) -> PlannedRun:
    """The run of ``model``, with room and predictions for ``prompt`` tokens; ``curve`` compares other contexts. Raises
    ColdstreamError."""
    subject = planned_model(model, stored.recipe, stored.by_hand())
    machine = target.find(model, options.over(subject.recipe).ram, console.step)
    run = planned_run(subject, options, machine=machine, prompt=prompt, curve=curve)
    if run.routing is not None and next(Path(model).glob("*.safetensors"), None) is not None:
        from quant.checkpoint.checkpoint import Checkpoint
        from quant.checkpoint.identity import model_id

        run.routing.check(model_id(Checkpoint.open(Path(model))))  # a run would refuse another model's, too
    return run


def stored_as(subject: PlannedModel) -> str:
    """What the weights are stored as, and how that is known."""
    return f"{schemes_line(subject.schemes, subject.shape) or 'bf16 throughout'} ({subject.origin})"
