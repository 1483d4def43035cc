"""``coldstream simulate --timeline``: a run replayed, for human eyes: speeds, what the time went to, what
each resource gave."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cli.commands.open_run import check_page
from cli.commands.plan import planned_machine, planned_schemes
from cli.terminal.console import Console
from cli.terminal.plan_table import machine_line
from cli.terminal.simulation_tables import document, lines, resources_table, waits_table
from cli.terminal.words import schemes_line
from offload.plan.plan import make_plan
from offload.routing.trace import RULES, Synthetic, Trace, load_trace
from offload.simulator.requests import stretched
from offload.simulator.simulation import Setup
from offload.tiers import Key
from quant.errors import ProfileError
from quant.model.recipe import load_recipe, resolve_config
from quant.model.shape import ModelShape

_BEFORE = 64  # tokens that a profile has seen at the least


@dataclass(frozen=True)
class Asked:
    """The options of a replay, as the command line takes them."""

    model: str
    recipe: str | None
    gpu: str | None
    vram: int | None
    ram: int | None
    context: int | None
    kv: Literal["bf16", "int8"] | None
    ram_gb_s: float | None
    disk_gb_s: float | None
    prompt_chunk: int | None
    prompt: int
    tokens: int
    swaps: int
    split: float | None

    def setup(self, say: Callable[[str], None]) -> tuple[Setup, str]:
        """The plan of the run, ready to be replayed, and what the weights are stored as and why. Raises
        ColdstreamError."""
        config = resolve_config(self.model)
        shape = ModelShape.from_config(config)
        named = load_recipe(self.recipe) if self.recipe else None
        schemes, defaults, origin = planned_schemes(self.model, config, shape, named, {}, 128)
        machine = planned_machine(self.model, self.gpu, self.ram, self.ram_gb_s, self.disk_gb_s, say=say)
        kv = self.kv or (defaults.kv if defaults else None)
        context = self.context or (defaults.context if defaults else None) or max(4096, self.prompt)
        plan = make_plan(
            shape,
            schemes,
            machine,
            vram=self.vram if self.vram is not None or defaults is None else defaults.vram,
            ram=self.ram if self.ram is not None or defaults is None else defaults.ram,
            context=context,
            kv_bits=8 if kv == "int8" else 16,
            filled=min(self.prompt, context),
            prompt_chunk=self.prompt_chunk or (defaults.prompt_chunk if defaults else None),
        )
        stored = f"{schemes_line(schemes) or 'bf16 throughout'} ({origin})"
        return Setup.of(shape, schemes, plan, machine, swaps=self.swaps, gpu_part=self.split), stored


def replay_run(asked: Asked, name: str, page: Path | None, console: Console) -> None:
    """Replay ``asked`` on the routing of ``name`` and say what came out. Raises ColdstreamError."""
    check_page(page)
    setup, stored = asked.setup(console.step)
    trace, counts, stretch = _routing(name, setup.footprint.shape, asked.tokens)
    decode = setup.decode(asked.tokens, trace=trace, counts=counts)
    prefill = setup.prefill()
    notes = [*setup.machine.notes, *setup.plan.notes]
    if stretch:
        notes.append(f"{name} has {stretch} MoE layers: the model's take turns, each on another stretch of it")
    if not console.json:
        console.say(f"{asked.model} on {machine_line(setup.machine)}; routing: {name}")
        console.say(f"{stored}; context {setup.plan.context:,}")
        console.say()
        console.show(waits_table(setup, decode))
        console.say()
        console.show(resources_table(decode))
        console.say()
        for line in lines(setup, decode, prefill):
            console.say(line)
        console.notes(tuple(notes))
    if page is not None:
        from cli.html.simulated_run import write_replay

        write_replay(setup, decode, prefill, f"{asked.model} on {setup.machine.name}", page)
        console.step(f"page written to {page}")
    console.result(
        {
            **document(setup, decode, prefill),
            "model": asked.model,
            "stored": stored,
            "trace": name,
            "notes": notes,
            "machine": setup.machine.to_json(),
            "plan": setup.plan.to_json(),
        }
    )


def _routing(name: str, shape: ModelShape, tokens: int) -> tuple[Trace, dict[Key, float], int]:
    """The trace to replay, the counts of what came before it, and its layers if they had to be stretched."""
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
