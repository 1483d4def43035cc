"""``coldstream simulate``: a run on a machine that need not be there, replayed event by event: speeds, what
the time went to, what each resource gave. No torch."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options.machine import AskedMachine, takes_machine
from cli.options.output import Report, takes_console
from cli.options.run import ModelOrShape, Recipe, takes_budgets
from cli.options.schemes import AskedSchemes
from cli.options.typed import typed_name
from cli.terminal.console import Console
from offload.records import RunOptions

if TYPE_CHECKING:
    from offload.routing.trace import Trace
    from offload.tiers import Key
    from quant.model.shape import ModelShape

TraceName = Annotated[
    str,
    typer.Option(
        "--trace",
        parser=typed_name,
        metavar="TRACE",
        help="Routing: a file of `profile --trace`, or uniform, zipf, recency, drift.",
    ),
]
Tokens = Annotated[int, typer.Option("--tokens", min=8, max=100_000, metavar="N", help="Tokens to decode.")]
Prompt = Annotated[int, typer.Option("--prompt", min=1, max=2**24, metavar="TOKENS", help="The prompt before them.")]
Swaps = Annotated[int, typer.Option("--swaps", min=0, metavar="N", help="Experts swapped into VRAM per token at most.")]
Split = Annotated[
    float | None,
    typer.Option("--split", min=0, max=1, metavar="PART", help="Part of a miss that the GPU reads in place (best)."),
]

_BEFORE = 64  # tokens that a profile has seen at the least


@takes_console
@takes_budgets
@takes_machine
def simulate(
    model: ModelOrShape,
    target: AskedMachine,
    console: Console,
    options: RunOptions,
    trace: TraceName = "uniform",
    recipe: Recipe = None,
    tokens: Tokens = 256,
    prompt: Prompt = 2048,
    swaps: Swaps = 1,
    split: Split = None,
    report: Report = None,
) -> None:
    """Replay a run of MODEL on this machine, or on one that is not there (--gpu), event by event.

    The first half of the trace is what a profile would have known of the routing, the second is replayed.
    """
    from cli.html.document import save_page
    from cli.html.simulated_run import render_replay
    from cli.steps.finish import check_page, command_line
    from cli.steps.plan_run import plan_run, stored_as
    from cli.terminal.plan_table import caution, machine_line
    from cli.terminal.replay_tables import replay_document, resources_table, rows, waits_table
    from offload.simulator.simulation import Simulation

    check_page(report)
    run = plan_run(model, AskedSchemes(recipe), target, options, console, prompt)
    subject, stored = run.model, stored_as(run.model)
    setup = Simulation.of(
        subject.shape, subject.schemes, run.plan, run.machine, subject.wider, swaps=swaps, gpu_part=split
    )
    routing, counts, stretch = _routing(trace, subject.shape, tokens)
    decode, prefill = setup.decode(tokens, trace=routing, counts=counts), setup.prefill()
    notes = [*setup.machine.notes, *setup.plan.notes]
    if stretch:
        notes.append(f"{trace} has {stretch} MoE layers: the model's take turns, each on another stretch of it")
    if not console.json:
        console.prose(f"{model} on {machine_line(setup.machine)}; routing: {trace}")
        console.prose(f"{stored}; context {setup.plan.context:,}")
        console.say()
        console.show(waits_table(setup, decode))
        console.say()
        console.show(resources_table(decode))
        console.say()
        console.rows([*rows(setup, decode, prefill), *caution(setup.machine)])
        console.notes(notes)
    console.result(
        {
            **replay_document(setup, decode, prefill),
            "model": model,
            "stored": stored,
            "trace": trace,
            "notes": notes,
            "machine": setup.machine.to_json(),
            "plan": setup.plan.to_json(),
        }
    )
    if report is not None:
        page = render_replay(
            setup,
            decode,
            prefill,
            f"{model} on {setup.machine.name}",
            command_line=command_line(),
            about={"Stored as": stored, "Routing": trace},
            doubts=[said for _, said in caution(setup.machine)],
            notes=notes,
        )
        save_page(page, report)
        console.step(f"page written to {report}")


def _routing(name: str, shape: "ModelShape", tokens: int) -> "tuple[Trace, dict[Key, float], int]":
    """The trace to replay, the counts of what came before it, and its layers if they had to be stretched."""
    from offload.routing.trace import RULES, Synthetic, load_trace
    from offload.simulator.requests import stretched
    from quant.errors import ProfileError

    layers = len(shape.moe_layers)
    wanted = 2 * (tokens + _BEFORE)
    if name in RULES:
        whole = Synthetic(name, layers=layers, num_experts=shape.num_experts, top_k=shape.top_k, tokens=wanted).trace()
        stretch = 0
    else:
        found = load_trace(Path(name))
        if (found.num_experts, found.top_k) != (shape.num_experts, shape.top_k):
            raise ProfileError(
                f"{name} is of a model with {found.num_experts} experts, top-{found.top_k}: expected "
                f"{shape.num_experts}, top-{shape.top_k}"
            )
        stretch = found.layers if found.layers != layers else 0
        whole = stretched(found, layers, len(found.steps))
    learned, judged = whole.halves()
    return judged, {key: float(count) for key, count in learned.counts().items()}, stretch
