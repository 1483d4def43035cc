"""A plan for human eyes: the table of bytes, and the sentences about speed, limits and what a GiB more
buys."""

from typing import TYPE_CHECKING

from cli.terminal.plain_table import plain_table
from cli.terminal.words import PLACES, TIER_NAMES, limit_name, number, percent, size
from offload.hardware.probe import Machine
from offload.plan.context import ContextPrediction
from offload.plan.plan import Plan
from offload.tiers import TIERS, Tier, role_name

if TYPE_CHECKING:
    from rich.table import Table

Row = tuple[str, str]
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
    "draft_model",
)  # any other role comes after these
_COLUMNS: dict[Tier, str] = {**TIER_NAMES, "disk": "only on disk"}
_SEEN = 0.001  # of a speed, that is worth a word
_UNKNOWN = "uniform routing assumed"


def machine_line(machine: Machine) -> str:
    """The machine that was planned for: what its memories hold, and at what rates they are read."""
    parts = [
        f"RAM {size(machine.ram_bytes)} at {number(machine.ram_gb_s)} GB/s",
        f"disk {number(machine.disk_gb_s)} GB/s",
    ]
    if machine.gpu:
        card = f"VRAM {size(machine.gpu.vram_bytes)} at {number(machine.gpu.vram_gb_s)} GB/s"
        parts = [card, *parts, f"PCIe {number(machine.gpu.h2d_gb_s)} GB/s"]
    return f"{machine.name}: {', '.join(parts)} ({'measured' if machine.measured else 'assumed'})"


def caution(machine: Machine) -> list[Row]:
    """That speeds of a machine which nobody measured are arithmetic."""
    said = "nobody has measured this machine: speeds are arithmetic on the vendor's figures"
    return [] if machine.measured else [("caution", said)]


def byte_table(plan: Plan) -> "Table":
    """Roles down, tiers across, every byte once."""
    tiers = [tier for tier in TIERS if plan.total(tier)]
    table = plain_table("", *(_COLUMNS[tier] for tier in tiers), "share")
    whole = sum(plan.total(tier) for tier in tiers)
    order = {role: at for at, role in enumerate(_ORDER)}
    for role in sorted({row.role for row in plan.rows}, key=lambda role: (order.get(role, len(order)), role)):
        sizes = {tier: plan.total(tier, role) for tier in tiers}
        cells = [size(sizes[tier]) if sizes[tier] else "" for tier in tiers]
        table.add_row(role_name(role), *cells, percent(sum(sizes.values()) / whole))
    table.add_section()
    table.add_row("all", *(size(plan.total(tier)) for tier in tiers), "", style="bold")
    budgets = {"vram": plan.vram, "ram": plan.ram + plan.framework_bytes, "disk": 0}
    table.add_row("budget", *(size(budgets[tier]) if budgets[tier] else "" for tier in tiers), "")
    return table


def speeds(plan: Plan) -> list[Row]:
    """Decode, prefill and where expert requests are served from."""
    decode, prefill = plan.decode, plan.prefill
    parts = ", ".join(f"{limit_name(name)} {number(1e3 * value)}" for name, value in decode.seconds.items())
    rows = [
        (
            "decode",
            f"{number(decode.tokens_per_s)} tokens/s, limited by {limit_name(decode.limited_by)} "
            f"({number(decode.ms_per_token)} ms: {parts})",
        ),
        (
            "prefill",
            f"{number(prefill.tokens_per_s)} tokens/s, limited by {limit_name(prefill.limited_by)} "
            f"(a prompt of {plan.filled:,}, chunks of {plan.prompt_chunk:,})",
        ),
    ]
    if decode.cpu_share is None and plan.together:  # on the CPU, where steps are shared
        several = [f"{one.n}: {number(one.tokens_per_s)}" for one in plan.together if one.n > 1]
        rows.append(("together", f"tokens/s of several sequences: {', '.join(several)}"))
    served = ", ".join(_served(plan, tier) for tier in TIERS if plan.hit_rates[tier] > 0)
    known = "by the routing profile" if plan.routing_known else _UNKNOWN
    if plan.experts:
        rows.append(("experts", f"{served} ({known})"))
    share = decode.cpu_share
    if share is not None and plan.hit_rates["vram"] < 1 and 0 < share < 1:
        rows.append(("", f"of what is not in VRAM the CPU computes {percent(share)}, the rest crosses PCIe"))
    return rows


def _served(plan: Plan, tier: Tier) -> str:
    hot = plan.vram_slots - plan.vram_reserve
    placed = {
        "vram": hot,
        "ram": min(plan.ram_slots, plan.experts - hot),
        "disk": max(0, plan.experts - hot - plan.ram_slots),
    }[tier]
    share = percent(plan.hit_rates[tier])
    return f"{placed:,} of {plan.experts:,} {PLACES[tier]} for {share} of requests"


def contexts(plan: Plan) -> list[Row]:
    """How long a text may be, what twice as long costs, and tokens/s by context, with a cache that is full."""
    by_length = {one.context: one for one in plan.contexts}
    this, twice = by_length.get(plan.context), by_length.get(2 * plan.context)
    if this is None:
        return []
    why = "as asked" if plan.context_asked else "the longest that costs no speed"
    said = f"{plan.context:,} tokens ({why}, {size(this.kv_bytes)} of KV cache)"
    if twice is not None:
        cost = this.tokens_per_s - twice.tokens_per_s
        said += f"; room for twice as many costs {number(cost)} tokens/s" if cost > _SEEN * this.tokens_per_s else ""
    elif 2 * plan.context <= plan.context_limit:
        said += "; twice as many do not fit"
    curve = ", ".join(f"{one.context:,}: {number(one.full_tokens_per_s)}" for one in plan.contexts)
    rows = [("context", said), ("", f"tokens/s once so many are there: {curve}")]
    if plan.total("disk", "kv_cache"):
        on_disk = size(plan.total("disk", "kv_cache"))
        rows.append(("", f"{on_disk} of the KV cache are on disk then; a prompt that fills it takes {_long(this)}"))
    return rows


def _long(context: ContextPrediction) -> str:
    hours = context.fill_seconds / 3600
    return f"{number(hours)} hours" if hours >= 1 else f"{number(60 * hours)} minutes"


def advice(plan: Plan) -> list[Row]:
    """What one more GiB of each tier would buy."""
    if not plan.gains:
        return [("1 GiB", f"more of {'VRAM or ' if plan.vram else ''}RAM would change nothing")]
    now = plan.predicted_tokens_per_s
    return [
        ("1 GiB", f"more of {TIER_NAMES[tier]}: {number(speed)} tokens/s (+{number(speed - now)})")
        for tier, speed in plan.gains.items()
    ]
