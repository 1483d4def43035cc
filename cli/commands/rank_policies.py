"""``coldstream rank-policies``: what each cache policy would have hit on recorded or made-up routing. No
torch."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options.output import takes_console
from cli.options.run import WITH_CONFIG, Ram, Recipe
from cli.options.typed import typed_name
from cli.terminal.console import Console
from offload.routing.eviction import DEFAULT_POLICY
from offload.routing.policy_replay import CLAIRVOYANT, PolicyHitRates, replay_policies, sizes_of
from offload.routing.trace import RULES, Synthetic, Trace, load_trace
from quant.errors import ProfileError, UsageError

if TYPE_CHECKING:
    from rich.table import Table

TraceName = Annotated[
    str,
    typer.Argument(
        parser=typed_name,
        metavar="TRACE",
        help="A file of `profile --trace`, or uniform, zipf, recency, drift: made up.",
    ),
]
Model = Annotated[
    str | None,
    typer.Option("--model", parser=typed_name, metavar="MODEL", help=f"Predict speeds for this model. {WITH_CONFIG}."),
]
Tokens = Annotated[
    int | None, typer.Option("--tokens", min=8, max=100_000, metavar="N", help="Tokens of the trace to use.")
]
Chunk = Annotated[
    int, typer.Option("--chunk", min=1, metavar="N", help="Tokens run at once: 1 is decode, more a prompt.")
]
Sizes = Annotated[int, typer.Option("--sizes", min=2, max=100, metavar="N", help="Cache sizes to try.")]

# Requests × experts of one replay; a policy looks at every resident for each miss.
_WORK = 10_000_000
_MADE_UP = 2048
_NAMES, _CELL = 18, 10  # columns that the names of policies take, and a cache size beside them


@takes_console
def rank_policies(
    trace: TraceName,
    console: Console,
    model: Model = None,
    ram: Ram = None,
    recipe: Recipe = None,
    tokens: Tokens = None,
    chunk: Chunk = 1,
    sizes: Sizes = 6,
) -> None:
    """Replay TRACE against each cache policy and the clairvoyant bound, for several cache sizes.

    The first half of the trace is what a profile would have known, the second is replayed. --model adds the
    predicted decode speeds on this machine, --ram the cache size that this budget makes.
    """
    for option, value in (("--ram", ram), ("--recipe", recipe)):
        if value is not None and model is None:
            raise UsageError(f"{option} says nothing without a model: name it with --model")
    target = _Target(model, recipe, console) if model else None
    found = _trace(trace, target, tokens)
    slots = sizes_of(found, sizes)
    budget = target.slots(ram) if target and ram is not None else None
    if budget is not None:
        slots = sorted({*slots, budget})
    console.step(f"replaying {len(found.steps) // 2:,} tokens of {found.layers} layers of {found.num_experts}")
    done = replay_policies(found, slots, chunk=chunk)
    speeds = target.speeds(done) if target and chunk == 1 else {}
    ranking = _Ranking(done, target, speeds, budget)
    if not console.json:
        ranking.show(console)
    console.result({**ranking.document(), "chunk": chunk})


class _Target:
    """A model on this machine, its GPU left alone, for what hit rates mean in tokens per second."""

    def __init__(self, model: str, recipe: str | None, console: Console) -> None:
        from offload.plan.footprint import Footprint
        from offload.plan.planned_run import planned_machine, planned_model

        self.model = planned_model(model, recipe)
        self.machine = replace(planned_machine(model, say=console.step), gpu=None)
        shape = self.model.shape
        self.footprint = Footprint(shape, self.model.schemes, shape.context(), 16, wider=self.model.wider)

    def slots(self, ram: int) -> int:
        """Expert slots within ``ram``. Raises BudgetError."""
        from offload.plan.planned_run import planned_run
        from offload.records import RunOptions

        return planned_run(self.model, RunOptions(vram=0, ram=ram), machine=self.machine).plan.ram_slots

    def speeds(self, done: PolicyHitRates) -> dict[str, list[float]]:
        """Predicted decode tokens/s by policy and size."""
        from offload.plan.cost_model import decode

        return {
            name: [
                decode(
                    self.footprint.load(filled=512, vram_hits=0.0, hits=rate, resident=count / self.footprint.experts),
                    self.machine,
                ).tokens_per_s
                for rate, count in zip(rates, done.slots, strict=True)
            ]
            for name, rates in done.hit_rates.items()
        }


def _trace(name: str, target: _Target | None, tokens: int | None) -> Trace:
    shape = target.footprint.shape if target else None
    if name in RULES:
        made = Synthetic(name)
        if shape:
            layers = len(shape.moe_layers)
            made = replace(made, layers=layers, num_experts=shape.num_experts, top_k=shape.top_k)
        keys = made.layers * made.num_experts
        most = max(64, _WORK // (made.layers * made.top_k * keys))
        return replace(made, tokens=tokens or min(_MADE_UP, most)).trace()
    found = load_trace(Path(name))
    if shape and (found.layers, found.num_experts) != (len(shape.moe_layers), shape.num_experts):
        raise ProfileError(
            f"{name} is of a model with {found.layers} MoE layers of {found.num_experts} experts: expected "
            f"{len(shape.moe_layers)} of {shape.num_experts}"
        )
    most = max(64, _WORK // (found.layers * found.top_k * len(found.keys)))
    return found.head(tokens or most)


@dataclass(frozen=True)
class _Ranking:
    """Hit rates, and with a model the speeds that they make and the slots that its budget does."""

    done: PolicyHitRates
    target: _Target | None
    speeds: dict[str, list[float]]
    budget: int | None

    @property
    def names(self) -> list[str]:
        """The policies, best first, without the bound."""
        return sorted((name for name in self.done.hit_rates if name != CLAIRVOYANT), key=self.done.regret)

    def show(self, console: Console) -> None:
        """Tables as wide as the terminal, a plot, and how far each policy is from the best possible."""
        from cli.terminal.line_plots import curves

        done, total = self.done, len(self.done.trace.keys)
        console.prose(f"Hit rate on {done.trace.name}, by policy and slots:")
        side_by_side = max(1, (console.width - _NAMES) // _CELL)
        for start in range(0, len(done.slots), side_by_side):
            console.show(self._table(range(start, min(start + side_by_side, len(done.slots)))))
        if self.budget is not None:
            console.prose("→ is what --ram holds beside the rest of the model")
        console.say("\nHit rate over the share of experts that have a slot:")
        console.say(curves([count / total for count in done.slots], done.hit_rates, width=min(64, console.width - 12)))
        listed = ", ".join(f"{name} {100 * done.regret(name):.1f}" for name in self.names)
        console.say()
        console.prose(f"Points below the clairvoyant bound, on average: {listed}. The default is {DEFAULT_POLICY}.")

    def _table(self, columns: range) -> "Table":
        """Policies down, cache sizes across."""
        from rich.table import Table

        from cli.terminal.words import number, percent, size

        done, total = self.done, len(self.done.trace.keys)
        counts = [done.slots[index] for index in columns]
        table = Table(box=None, pad_edge=False)
        table.add_column("slots", no_wrap=True)
        for count in counts:
            table.add_column(f"{'→ ' if count == self.budget else ''}{count:,}", justify="right", no_wrap=True)
        table.add_row("of all experts", *(percent(count / total) for count in counts))
        if self.target:
            table.add_row("RAM", *(size(count * self.target.footprint.slot_bytes) for count in counts))
        table.add_section()
        for name, rates in done.hit_rates.items():
            cells = [f"{100 * rates[index]:.1f} %" for index in columns]
            best = [name == done.best(index) for index in columns]
            marked = [f"[bold]{cell}[/bold]" if first else cell for cell, first in zip(cells, best, strict=True)]
            table.add_row("bound" if name == CLAIRVOYANT else name, *marked)
        for name, shown in ((DEFAULT_POLICY, DEFAULT_POLICY), (CLAIRVOYANT, "bound")) if self.speeds else ():
            table.add_row(f"tokens/s, {shown}", *(number(self.speeds[name][index]) for index in columns))
        return table

    def document(self) -> dict[str, object]:
        """What ``--json`` prints of it."""
        done, trace = self.done, self.done.trace
        kept = {name: getattr(trace, name) for name in ("name", "layers", "num_experts", "top_k")}
        return {
            "trace": kept | {"tokens": len(trace.steps)},
            "slots": done.slots,
            "slot_bytes": self.target.footprint.slot_bytes if self.target else None,
            "slots_of_ram": self.budget,
            "hit_rates": done.hit_rates,
            "tokens_per_s": self.speeds,
            "regret": {name: done.regret(name) for name in self.names},
            "best": self.names[0],
            "default": DEFAULT_POLICY,
        }
