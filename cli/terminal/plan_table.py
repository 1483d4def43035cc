"""A plan for human eyes: the table of bytes, and the sentences about speed, limits and what a GiB more
buys."""

from typing import TYPE_CHECKING

from cli.terminal.words import TIER_NAMES, number, percent, role_name, size
from offload.hardware.probe import Machine
from offload.plan.plan import Plan
from offload.tiers import TIERS, Tier

if TYPE_CHECKING:
    from rich.table import Table

_ORDER = (
    "experts_hot",
    "experts_warm",
    "experts_cold",
    "shared_expert",
    "dense_mlp",
    "attention",
    "lm_head",
    "embeddings",
    "router",
    "norm",
    "kv_cache",
    "scratch",
    "padding",
    "framework",
    "vision",
)
_PLACES: dict[Tier, str] = {"vram": "in VRAM", "ram": "in RAM", "disk": "on disk"}
_UNKNOWN = "uniform routing assumed"


def machine_line(machine: Machine) -> str:
    """The machine that was planned for, with its rates."""
    rates = [f"RAM {number(machine.ram_gb_s)}", f"disk {number(machine.disk_gb_s)}"]
    if machine.gpu:
        rates = [f"VRAM {number(machine.gpu.vram_gb_s)}", *rates, f"PCIe {number(machine.gpu.h2d_gb_s)}"]
    how = "measured" if machine.measured else "assumed"
    return f"{machine.name}: {', '.join(rates)} GB/s ({how})"


def byte_table(plan: Plan) -> "Table":
    """Roles down, tiers across, every byte once."""
    from rich.table import Table

    tiers = [tier for tier in TIERS if plan.total(tier)]
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for tier in tiers:
        table.add_column(TIER_NAMES[tier], justify="right")
    table.add_column("share", justify="right")
    whole = sum(plan.total(tier) for tier in tiers)
    for role in sorted({row.role for row in plan.rows}, key=_ORDER.index):
        sizes = {tier: plan.total(tier, role) for tier in tiers}
        cells = [size(sizes[tier]) if sizes[tier] else "" for tier in tiers]
        table.add_row(role_name(role), *cells, percent(sum(sizes.values()) / whole))
    table.add_section()
    table.add_row("all", *(size(plan.total(tier)) for tier in tiers), "", style="bold")
    budgets = {"vram": plan.vram, "ram": plan.ram + plan.framework_bytes, "disk": 0}
    table.add_row("budget", *(size(budgets[tier]) if budgets[tier] else "" for tier in tiers), "")
    return table


def speeds(plan: Plan) -> list[str]:
    """Decode, prefill and where expert requests are served from."""
    decode, prefill = plan.decode, plan.prefill
    parts = ", ".join(f"{name} {number(1e3 * value)}" for name, value in decode.seconds.items())
    lines = [
        f"decode    {number(decode.tokens_per_s)} tokens/s, limited by {decode.limited_by} "
        f"({number(decode.ms_per_token)} ms: {parts})",
        f"prefill   {number(prefill.tokens_per_s)} tokens/s, limited by {prefill.limited_by} "
        f"(a prompt of {plan.filled:,}, chunks of {plan.prompt_chunk:,})",
    ]
    served = ", ".join(_served(plan, tier) for tier in TIERS if plan.hit_rates[tier] > 0)
    known = "by the routing profile" if plan.routing_known else _UNKNOWN
    lines.append(f"experts   {served} ({known})")
    share = decode.cpu_share
    if share is not None and plan.hit_rates["vram"] < 1 and 0 < share < 1:
        lines.append(f"          of what is not in VRAM the CPU computes {percent(share)}, the rest crosses PCIe")
    return lines


def _served(plan: Plan, tier: Tier) -> str:
    hot = plan.vram_slots - plan.vram_reserve
    placed = {
        "vram": hot,
        "ram": min(plan.ram_slots, plan.experts - hot),
        "disk": max(0, plan.experts - hot - plan.ram_slots),
    }[tier]
    share = percent(plan.hit_rates[tier])
    return f"{placed:,} of {plan.experts:,} {_PLACES[tier]} for {share} of requests"


def advice(plan: Plan) -> list[str]:
    """What one more GiB of each tier would buy."""
    if not plan.gains:
        return [f"1 GiB     more of {'VRAM or ' if plan.vram else ''}RAM would change nothing"]
    return [
        f"1 GiB     more of {TIER_NAMES[tier]}: {number(speed)} tokens/s "
        f"(+{number(speed - plan.predicted_tokens_per_s)})"
        for tier, speed in plan.gains.items()
    ]
