"""Where the bytes are: a bar for each tier, and one table of roles by tiers below. At most six colours: the five
largest roles have one each, the same in every tier, and the others share the sixth."""

from collections.abc import Mapping, Sequence
from html import escape

from cli.html.document import section, text
from cli.terminal.words import TIER_NAMES, percent, sentence, size
from offload.run.report import Memory, RunReport
from offload.tiers import TIERS, Tier, role_name

COLOURS = 6  # one of them for all that is folded together
_NAMES: dict[Tier, str] = {**TIER_NAMES, "disk": "Files"}
_SMALL = 0.02  # of every tier that has it: too thin to be seen


def memory_section(report: RunReport) -> str:
    """Bars, table, and what the operating system says about it."""
    memory = report.memory
    tiers = [tier for tier in TIERS if any(memory.of(tier).values())]
    shown = largest_roles(memory)
    budgets = {"vram": report.request.vram_bytes, "ram": report.request.ram_bytes, "disk": 0}
    bars = "".join(_bar(tier, memory.of(tier), shown, budgets[tier]) for tier in tiers)
    side = "more than the roles explain" if memory.unaccounted_bytes >= 0 else "less than the roles add up to"
    said = (
        f'<p class="quiet">The operating system counts {size(memory.rss_bytes)} resident at the end, '
        f"{size(memory.peak_rss_bytes)} at the peak: {size(abs(memory.unaccounted_bytes))} {side}. "
        "Files are all of the model on disk, whatever else holds a copy.</p>"
    )
    return section("Where the bytes are", bars + _table(memory, tiers, shown) + said)


def largest_roles(memory: Memory) -> list[str]:
    """The roles that get a colour of their own, by the largest part of a tier that each takes."""
    part: dict[str, float] = {}
    for tier in TIERS:
        total = sum(memory.of(tier).values())
        for role, count in memory.of(tier).items():
            part[role] = max(part.get(role, 0.0), count / total if total else 0.0)
    ordered = sorted((role for role in part if part[role] >= _SMALL), key=lambda role: -part[role])
    small = len(part) - len(ordered)
    # A sixth role may have the sixth colour if there is nothing else to fold.
    return ordered if len(ordered) <= COLOURS - (1 if small else 0) else ordered[: COLOURS - 1]


def _css(role: str, shown: Sequence[str]) -> str:
    return f"role{shown.index(role)}" if role in shown and shown.index(role) < COLOURS - 1 else "role-other"


def _bar(tier: Tier, roles: Mapping[str, int], shown: Sequence[str], budget: int) -> str:
    total = sum(roles.values())
    folded = total - sum(roles.get(role, 0) for role in shown)
    parts = [(role, roles.get(role, 0)) for role in shown] + [("other", folded)]
    items = "".join(
        f'<i class="{_css(role, shown)}" style="flex:{count} 1 0" title="{escape(role_name(role))}: {size(count)}"></i>'
        for role, count in parts
        if count
    )
    of = f'<span class="quiet"> of a budget of {size(budget)}</span>' if budget else ""
    return (
        f'<div class="tier"><div class="head"><b>{_NAMES[tier]}</b><span>{size(total)}{of}</span></div>'
        f'<div class="bar" aria-hidden="true">{items}</div></div>'
    )


def _table(memory: Memory, tiers: Sequence[Tier], shown: Sequence[str]) -> str:
    everywhere = {role for tier in tiers for role, count in memory.of(tier).items() if count}
    folded = sorted(everywhere - set(shown), key=lambda role: -sum(memory.of(tier).get(role, 0) for tier in tiers))
    rows = "".join(_row(text(sentence(role_name(role))), _css(role, shown), [role], memory, tiers) for role in shown)
    if folded:
        rows += _row("Other", "role-other", folded, memory, tiers)
    heads = "".join(f'<th scope="col" class="number">{_NAMES[tier]}</th>' for tier in tiers)
    small = ""
    if folded:
        inner = "".join(_row(text(sentence(role_name(role))), "", [role], memory, tiers) for role in folded)
        small = f"<details><summary>What is in Other</summary><table><tbody>{inner}</tbody></table></details>"
    many = " many" if len(tiers) > 2 else ""
    head = f'<thead><tr><th scope="col">Role</th>{heads}</tr></thead>'
    return f'<table class="roles{many}">{head}<tbody>{rows}</tbody></table>{small}'


def _row(name: str, css: str, roles: Sequence[str], memory: Memory, tiers: Sequence[Tier]) -> str:
    cells = ""
    for tier in tiers:
        count, total = sum(memory.of(tier).get(role, 0) for role in roles), sum(memory.of(tier).values())
        said = f'{size(count)} <span class="share">{percent(count / total)}</span>' if count else ""
        cells += f'<td class="number">{said}</td>'
    swatch = f'<span class="swatch {css}"></span>' if css else ""
    return f'<tr><th scope="row">{swatch}{name}</th>{cells}</tr>'
