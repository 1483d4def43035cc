"""A simulated run on the terminal: what a token waited for, what passed each resource, and the sentences."""

from typing import TYPE_CHECKING, Any

from cli.terminal.plain_table import plain_table
from cli.terminal.words import PLACES, limit_name, number, percent, size
from offload.simulator.simulation import SimulatedPhase, Simulation
from offload.tiers import TIERS

if TYPE_CHECKING:
    from rich.table import Table

CAUSES = {
    "vram": "VRAM reads (dense part, hits)",
    "cpu": "the CPU's part of misses",
    "pcie": "reads and copies over PCIe",
    "disk": "the disk",
    "doorbell": "doorbell",
    "compute": "arithmetic",
    "overhead": "small kernels, step",
}
CPU_CAUSES = {**CAUSES, "cpu": "RAM reads", "overhead": "overhead"}
RESOURCES = {
    "vram": "VRAM",
    "pcie": "PCIe",
    "ram": "RAM",
    "cpu": "CPU",
    "disk": "disk",
    "gpu": "GPU arithmetic",
    "cpu compute": "CPU arithmetic",
}


def causes(setup: Simulation) -> dict[str, str]:
    """What waits are called on this machine."""
    return CAUSES if setup.machine.gpu else CPU_CAUSES


def waits_table(setup: Simulation, decode: SimulatedPhase) -> "Table":
    """What a decoded token waited for, longest first."""
    table = plain_table("a token waits for", "ms", "share")
    names = causes(setup)
    for cause, seconds in sorted(decode.waited.items(), key=lambda item: -item[1]):
        share = percent(seconds * decode.tokens_per_s)
        table.add_row(names.get(cause, cause), number(1e3 * seconds), share)
    table.add_section()
    table.add_row("all", number(1e3 / decode.tokens_per_s), "", style="bold")
    return table


def resources_table(decode: SimulatedPhase) -> "Table":
    """What passed each resource per token, and the part of what it could have given."""
    table = plain_table("resource", "per token", "of its rate")
    for name, amount in decode.moved.items():
        if amount and "arithmetic" not in RESOURCES[name]:
            table.add_row(RESOURCES[name], size(round(amount)), percent(decode.used[name]))
    return table


def rows(setup: Simulation, decode: SimulatedPhase, prefill: SimulatedPhase) -> list[tuple[str, str]]:
    """The sentences beside the tables."""
    served = ", ".join(f"{percent(decode.hit_rates[tier])} {PLACES[tier]}" for tier in TIERS if decode.hit_rates[tier])
    planned = setup.plan.predicted_tokens_per_s
    found = [
        (
            "decode",
            f"{number(decode.tokens_per_s)} tokens/s over {decode.tokens:,} tokens, limited by "
            f"{limit_name(decode.limited_by)} (the plan's arithmetic says {number(planned)}: it knows neither this "
            "trace nor swaps nor waits)",
        ),
        (
            "prefill",
            f"{number(prefill.tokens_per_s)} tokens/s for a prompt of {prefill.tokens:,} in chunks of "
            f"{setup.plan.prompt_chunk:,}, limited by {limit_name(prefill.limited_by)} (by arithmetic "
            f"{number(setup.plan.predicted_prefill_tokens_per_s)})",
        ),
    ]
    if served:
        found.append(("experts", f"requests found theirs {served}"))
    if served and setup.machine.gpu and decode.hit_rates["vram"] < 1:
        found.append(("", f"of a miss the GPU reads {percent(setup.part)} in place, the CPU does the rest"))
    return found


def replay_document(setup: Simulation, decode: SimulatedPhase, prefill: SimulatedPhase) -> dict[str, Any]:
    """What ``--json`` prints of it."""
    return {
        "decode": decode.to_json(),
        "prefill": prefill.to_json(),
        "gpu_part": setup.part,
        "planned_tokens_per_s": setup.plan.predicted_tokens_per_s,
        "planned_prefill_tokens_per_s": setup.plan.predicted_prefill_tokens_per_s,
    }
