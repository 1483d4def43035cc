"""Bits by what they are worth: what is measured for it, and what was chosen."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.options.goal import Goal
from cli.options.machine import AskedMachine
from cli.options.schemes import AUTO, GROUP_SIZE, AskedSchemes
from cli.terminal.console import Console
from cli.terminal.progress import progress_bar
from quant.errors import UsageError
from quant.scheme import LEAST_BITS
from quant.sizes import format_size

if TYPE_CHECKING:
    from offload.plan.plan import Plan
    from offload.quality.windows import Windows
    from quant.allocation.allocate import Allocation, Choices
    from quant.allocation.units import Unit
    from quant.checkpoint.checkpoint import Checkpoint
    from quant.model.families import Role
    from quant.model.mixed_precision import MixedPrecision
    from quant.rounding.imatrix import Imatrix
    from quant.rounding.rounding import Rounder
    from quant.scheme import Scheme


def open_roles(asked: AskedSchemes, *, measured: bool) -> "tuple[list[Role], dict[Role, Scheme]]":
    """The roles whose bits are to be chosen, and the schemes of those that were named by hand.

    A recipe says which roles are quantized at all; without one all are. ``auto`` by hand opens a role. The
    head is opened for a measurement only, else it has 8 bits: errors of its weights are errors of the logits,
    which weights alone do not tell.
    """
    from quant.model.families import TEXT_ROLES
    from quant.scheme import Scheme

    recipe = asked.load_recipe()
    opened = {role for role, text in asked.roles.items() if text == AUTO}
    roles = set(recipe.schemes if recipe else TEXT_ROLES) | opened
    fixed = replace(asked, roles={role: text for role, text in asked.roles.items() if role not in opened}).by_hand()
    if not measured and "lm_head" in roles and "lm_head" not in asked.roles:
        fixed["lm_head"] = Scheme("int8", asked.group_size or GROUP_SIZE)
    if "vision" in opened:
        raise UsageError("--vision auto: what looking at images is worth is not measured; expected int8 or bf16")
    if recipe and "vision" in recipe.schemes:
        fixed.setdefault("vision", recipe.schemes["vision"])
    return [role for role in TEXT_ROLES if role in roles and role not in fixed], fixed


@dataclass(frozen=True)
class BitChoice:
    """What bits are chosen by: a ``goal``, the schemes of roles that are ``fixed``, and evidence: a text's
    ``windows``, the ``imatrix`` of one, a ``routing`` profile, or weights alone.

    ``rounder`` rounds what is tried. What was measured and chosen for ``job`` is kept in ``folder``, and taken from
    there to ``resume``.
    """

    checkpoint: "Checkpoint"
    goal: Goal
    fixed: "Mapping[Role, Scheme]"
    rounder: "Rounder"
    windows: "Windows | None"
    imatrix: "Imatrix | None"
    routing: Path | None
    folder: Path
    job: "Mapping[str, Any]"
    resume: bool
    console: Console

    def make(self, roles: "list[Role]") -> "tuple[MixedPrecision, Allocation]":
        """Measure, choose for ``roles``, and show the table; or what a stopped run has chosen for the same."""
        from cli.terminal.allocation_table import allocation_table
        from quant.allocation.allocator import split_roles
        from quant.allocation.findings import kept_allocation

        console = self.console
        units, kept = split_roles(self.checkpoint, roles, self.fixed, self.goal.per_expert, self.goal.least_bits)
        found = kept_allocation(self.folder / "allocation.json", self.job, units) if self.resume else None
        allocation = found or self._chosen(units, kept)
        mixture = allocation.mixture(kept)
        console.step(f"bits chosen by {allocation.how}:")
        if not console.json:
            console.show(allocation_table(allocation))
        console.step(
            f"{allocation.bits:.3f} bits per quantized weight, {format_size(allocation.nbytes)}; expected loss "
            f"{allocation.loss:.4g}, of {sum(c.options[0].loss for c in allocation.choices):.4g} with the fewest bits"
        )
        console.prose(self._head(allocation))
        console.notes(self._notes(allocation, mixture))
        return mixture, allocation

    def _chosen(self, units: "list[Unit]", kept: "list[tuple[Unit, Scheme]]") -> "Allocation":
        """The choice by what is measured now, kept for a run that is resumed."""
        from quant.allocation.allocator import Allocator
        from quant.allocation.findings import keep_allocation

        goal = self.goal
        choices, how = self._choices(units)
        self.checkpoint.check_unchanged()
        allocator = Allocator(
            self.checkpoint, choices, kept, how, uneven=goal.per_expert or goal.least_bits < LEAST_BITS
        )
        if goal.bits is not None:
            allocation = allocator.by_bits(goal.bits)
        elif goal.size is not None:
            allocation = allocator.by_size(goal.size)
        else:
            fitting = _Fitting(self.checkpoint, goal, self.console)
            allocation = allocator.by_fit(fitting, fitting.wanted)
            self.console.step(fitting.said(allocation.mixture(kept)))
        keep_allocation(self.folder / "allocation.json", self.job, allocation)
        return allocation

    def _head(self, allocation: "Allocation") -> str:
        """Whether the LM head takes part in the mean, and how to have it otherwise."""
        chosen = [option for unit, option in allocation.chosen if unit.role == "lm_head"]
        if chosen:
            nbytes = sum(option.nbytes for option in chosen)
            return (
                f"The LM head takes part: {nbytes / allocation.nbytes:.1%} of this size; --lm-head bf16 (or int8)"
                " leaves it out of the mean."
            )
        if self.checkpoint.shape.tie_word_embeddings:
            return "The LM head is the embeddings, which stay as they are: it is not in the mean."
        stays = str(self.fixed["lm_head"]) if "lm_head" in self.fixed else "as it is in SRC"
        return f"The LM head is not in the mean: it stays {stays}; --lm-head auto lets it take part."

    def _notes(self, allocation: "Allocation", mixture: "MixedPrecision") -> Iterator[str]:
        """What a choice costs a run, and what it could not use."""
        shape, goal = self.checkpoint.shape, self.goal
        mean = shape.experts_nbytes(mixture) / max(shape.num_experts * len(shape.moe_layers), 1)
        largest = shape.largest_expert(mixture)
        if goal.per_expert and largest > mean * 1.01:
            yield (
                f"experts take up to {format_size(largest)}, {format_size(mean)} in the mean: VRAM holds as many as if "
                f"all were the largest ({largest / mean - 1:.0%} more), RAM on a CPU what each takes; a GPU computes "
                "experts stored unlike most of their layer in calls of their own"
            )
        even = not goal.per_expert and goal.least_bits == LEAST_BITS
        if goal.bits is not None and even and allocation.bits < 0.97 * goal.bits < 8:
            yield (
                f"{goal.bits:g} bits are not used up: all experts have one width, because a slot in VRAM has room for "
                "the largest; --per-expert lifts that"
            )

    def _choices(self, units: "list[Unit]") -> "tuple[list[Choices], str]":
        """Each unit's schemes with what they lose, and how that is known."""
        from quant.allocation.estimate import estimates

        checkpoint, windows = self.checkpoint, self.windows
        if windows is None:
            what = "outputs" if self.imatrix else "weights"
            known = "a routing profile" if self.routing else "all experts used alike"
            how = f"relative error of {what}, equal errors taken for equal harm, {known}"
            return estimates(checkpoint, units, self.rounder, self.imatrix, self._shares()), how
        from offload.quality.sensitivity import sample_tokens, sensitivities, stream_bytes
        from quant.allocation.findings import keep_losses, kept_losses

        file = self.folder / "sensitivity.json"
        job = {
            "source": checkpoint.identity,
            "state": checkpoint.states.listed(checkpoint.files),
            "text": windows.identity,
            "rounding": self.rounder.name,
            "units": [f"{unit.name} {unit.least_bits}" for unit in units],
        }
        tokens = min(windows.tokens, sample_tokens(checkpoint, units))
        how = f"divergence on {tokens:,} tokens of the text, each part rounded alone"
        found = kept_losses(file, job, units) if self.resume else None
        if found is None:
            self.console.step(
                f"measuring what bits are worth on {tokens:,} tokens; takes one layer's experts and "
                f"{format_size(stream_bytes(checkpoint, units, tokens))} of memory beside the dense weights"
            )
            with progress_bar(self.console, "measuring", "layers") as show:
                found = sensitivities(checkpoint, units, windows.ids, self.rounder, show)
            keep_losses(file, job, found)
        return found, how

    def _shares(self) -> dict[tuple[int, int], float] | None:
        """The part of its layer's requests that goes to each (layer, expert), if that is known."""
        if self.routing is None:
            return None
        from offload.routing.stats import RoutingStats

        stats = RoutingStats.load(self.routing, self.checkpoint.shape)
        return {
            (layer, expert): int(count) / max(int(counts.sum()), 1)
            for layer, counts in zip(stats.moe_layers, stats.counts, strict=True)
            for expert, count in enumerate(counts)
        }


class _Fitting:
    """What --fit is to fit: a machine, budgets and a context, and maybe a speed."""

    def __init__(self, checkpoint: "Checkpoint", goal: Goal, console: Console) -> None:
        from offload.records import RunOptions

        self.checkpoint, self.speed = checkpoint, goal.speed
        self.options = RunOptions(vram=goal.vram, ram=goal.ram, context=goal.context)
        target = AskedMachine(gpu=None if goal.fit == "this" else goal.fit)
        self.machine = target.find(checkpoint.path, goal.ram, console.step)

    @property
    def wanted(self) -> str:
        """What schemes have to do, for a refusal."""
        return f"{self.speed:g} tokens/s" if self.speed is not None else "with every expert in memory"

    def plan(self, schemes: "Mapping[Role, Scheme]") -> "Plan":
        """The plan of a run there. Raises BudgetError if there is none."""
        from offload.plan.planned_run import PlannedModel, planned_run
        from quant.checkpoint.inventory import wider_bytes

        wider = wider_bytes(self.checkpoint, schemes)
        model = PlannedModel(self.checkpoint.shape, schemes, "by hand", wider=wider)
        return planned_run(model, self.options, machine=self.machine).plan

    def __call__(self, schemes: "Mapping[Role, Scheme]") -> bool:
        """Whether every expert is in memory then or, where a speed was asked for, that is predicted."""
        from quant.errors import BudgetError

        try:
            plan = self.plan(schemes)
        except BudgetError:
            return False
        if self.speed is not None:
            return plan.predicted_tokens_per_s >= self.speed
        return plan.vram_slots + plan.ram_slots >= plan.experts

    def said(self, schemes: "Mapping[Role, Scheme]") -> str:
        """What was fitted into, and how."""
        plan = self.plan(schemes)
        hot = min(plan.vram_slots, plan.experts)
        warm = min(plan.ram_slots, plan.experts - hot)
        cold = plan.experts - hot - warm
        places = [f"{hot:,} experts in {format_size(plan.vram)} of VRAM"] if hot else []
        places += [f"{warm:,} experts in {format_size(plan.ram)} of RAM"] if warm else []
        places += [f"{cold:,} on disk"] if cold else []
        return (
            f"fits {self.machine.name}: {', '.join(places)}, beside a context of {plan.context:,} tokens; "
            f"{plan.predicted_tokens_per_s:,.1f} tokens/s predicted (--vram, --ram and --context set others)"
            + ("" if self.machine.measured else "; nobody has measured this machine")
        )
