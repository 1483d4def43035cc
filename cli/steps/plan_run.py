"""A run as the command line describes it, planned: model, what it is stored as, machine and options."""

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
) -> PlannedRun:
    """The run of ``model``, with room and predictions for ``prompt`` tokens. Raises ColdstreamError."""
    subject = planned_model(model, stored.recipe, stored.by_hand())
    machine = target.find(model, options.over(subject.recipe).ram, console.step)
    return planned_run(subject, options, machine=machine, prompt=prompt)


def stored_as(subject: PlannedModel) -> str:
    """What the weights are stored as, and how that is known."""
    return f"{schemes_line(subject.schemes, subject.shape) or 'bf16 throughout'} ({subject.origin})"
