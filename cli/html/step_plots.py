"""The report page's three plots over the steps of a run: time per token, memory, expert requests."""

import statistics
from collections.abc import Sequence

from cli.html import svg_plots
from cli.html.svg_plots import Bins, nice_ticks, value_ticks
from cli.terminal.words import TIER_NAMES, limit_name, number, percent, size
from offload.records import TokenRecord
from offload.run.report import RunReport
from offload.run.speed import percentile
from offload.tiers import TIERS, Tier

_GIB, _MIB = 2**30, 2**20
_FAR = 2.5  # times what was used: a budget that high would flatten the curve


def time_plot(report: RunReport, readouts: dict[str, list[str]]) -> str:
    """Decode steps only: range and median of each bin's time per token, beside the median and the floor."""
    times = [1e3 * r.busy_seconds for r in report.records if r.phase == "decode"]
    if not times:
        return ""
    bins = Bins(len(times))
    groups = [sorted(times[start:end]) for start, end in bins.spans]
    middles = [statistics.median(group) for group in groups]
    median, floor = report.decode.ms_per_token_p50 or statistics.median(times), report.decode.floor_ms_per_token
    top = 1.15 * min(times_top(times), max(*times, floor or 0))
    grouped = len(times) > len(groups)
    band = svg_plots.bars([group[0] for group in groups], [group[-1] for group in groups], top) if grouped else ""
    drawing = f'<g class="plain"><path class="range" d="{band}"/>'
    drawing += f'<path class="line" d="{svg_plots.line(middles, top)}"/></g>' + svg_plots.level(median, top, "rule")
    marks = [(median, f"median {number(median)} ms")]
    if floor:
        drawing += svg_plots.level(floor, top, "floor")
        marks.append((floor, f"{limit_name(report.limited_by)} floor {number(floor)} ms"))
    readouts["time"] = [
        f"{_span('Token', span)}: {number(statistics.median(g))} ms"
        + (f", from {number(g[0])} to {number(g[-1])}" if len(g) > 1 else "")
        for span, g in zip(bins.spans, groups, strict=True)
    ]
    above = sum(time > top for time in times)
    cut = f" {above:,} slower step{'s are' if above > 1 else ' is'} cut off, the slowest took " if above else ""
    cut += f"{number(max(times))} ms." if above else ""
    label = f"Time per decoded token over {len(times):,} tokens: median {number(median)} ms."
    figure = svg_plots.plot(
        "time", drawing, label=label, x=bins.ticks(), y=value_ticks(top), tags=svg_plots.tags(marks, top)
    )
    legend = "Line: median of the tokens drawn together; band: fastest to slowest of them." if len(times) > 240 else ""
    return f'<h3>Time per token in ms, over the decoded tokens</h3>{figure}<p class="quiet">{legend}{cut}</p>'


def times_top(times: Sequence[float]) -> float:
    """Upper edge that keeps rare outliers from flattening the plot."""
    ordered = sorted(times)
    high, median = percentile(ordered, 0.99) or 0.0, percentile(ordered, 0.5) or 0.0
    return max(1.3 * high, 1.5 * median)


def memory_plot(
    records: Sequence[TokenRecord], readouts: dict[str, list[str]], ram_budget: int = 0, vram_budget: int = 0
) -> str:
    """Resident and VRAM bytes after every step, prompts shaded, below the budgets (bytes; 0 for none)."""
    if not any(record.rss_bytes for record in records):
        return ""
    bins = Bins(len(records))
    groups = [records[start:end] for start, end in bins.spans]
    resident = [max(r.rss_bytes for r in group) for group in groups]
    vram = [max(r.vram_bytes for r in group) for group in groups]
    most = max(*resident, *vram)
    budgets = {"ram": ram_budget, "vram": vram_budget if any(vram) else 0}
    near = {tier: budget for tier, budget in budgets.items() if 0 < budget < _FAR * most}
    top = 1.12 * max(most, *near.values(), 0)
    unit, name = (_GIB, "GiB") if top >= _GIB else (_MIB, "MiB")
    prompts = [top if any(r.phase == "prefill" for r in group) else 0.0 for group in groups]
    drawing = f'<path class="prompt" d="{svg_plots.bars([0.0] * len(prompts), prompts, top)}"/>'
    drawing += _curve(resident, top, "ram") + (_curve(vram, top, "vram") if any(vram) else "")
    for tier, budget in near.items():
        drawing += f'<g class="{tier}">{svg_plots.level(budget, top, "budget")}</g>'
    tags = svg_plots.tags([(budget, f"{tier.upper()} budget {size(budget)}") for tier, budget in near.items()], top)
    far = [f"{size(budget)} of {tier.upper()}" for tier, budget in budgets.items() if budget and tier not in near]
    beyond = f'<p class="quiet">The budget, {" and ".join(far)}, lies far above this plot.</p>' if far else ""
    readouts["memory"] = [
        f"{_span('Step', span)}{_prompt(group)}: {size(rss)} resident" + (f", {size(gpu)} of VRAM" if gpu else "")
        for span, group, rss, gpu in zip(bins.spans, groups, resident, vram, strict=True)
    ]
    y = [(value * unit / top, f"{value:g}") for value in nice_ticks(top / unit)]
    label = f"Memory over {len(records):,} steps: at most {size(max(resident))} resident."
    figure = svg_plots.plot("memory", drawing, label=label, x=bins.ticks(), y=y, tags=tags, css="low")
    legend = '<li><span class="swatch ram"></span>Resident (RAM)</li>'
    legend += '<li><span class="swatch vram"></span>VRAM</li>' if any(vram) else ""
    legend += '<li><span class="swatch other" style="--part:30%"></span>prompt being run</li>'
    return f'<h3>Memory in {name}, over the steps</h3>{figure}<ul class="legend">{legend}</ul>{beyond}'


def requests_plot(records: Sequence[TokenRecord], readouts: dict[str, list[str]]) -> str:
    """Where the experts asked for were, as shares of each bin's requests."""
    if not any(any(record.by_tier.values()) for record in records):
        return ""
    bins = Bins(len(records))
    groups = [records[start:end] for start, end in bins.spans]
    counts = [{tier: sum(r.by_tier.get(tier, 0) for r in group) for tier in TIERS} for group in groups]
    sums = [sum(count.values()) or 1 for count in counts]
    base = [0.0] * len(groups)
    drawing = ""
    present: list[Tier] = [tier for tier in TIERS if any(count[tier] for count in counts)]
    for tier in present:
        high = [low + count[tier] / total for low, count, total in zip(base, counts, sums, strict=True)]
        drawing += f'<g class="{tier}"><path class="solid" d="{svg_plots.bars(base, high, 1.0)}"/></g>'
        base = high
    readouts["requests"] = [
        f"{_span('Step', span)}{_prompt(group)}: "
        + ", ".join(f"{count[tier]:,} from {TIER_NAMES[tier]}" for tier in present)
        for span, group, count in zip(bins.spans, groups, counts, strict=True)
    ]
    y = [(part, f"{100 * part:.0f} %") for part in (0.0, 0.5, 1.0)]
    label = f"Share of expert requests by tier over {len(records):,} steps."
    figure = svg_plots.plot("requests", drawing, label=label, x=bins.ticks(), y=y, css="low")
    total = sum(sums)
    legend = "".join(
        f'<li><span class="swatch {tier}"></span>{TIER_NAMES[tier]}{"" if tier == "disk" else " (hit)"}: '
        f"{percent(sum(count[tier] for count in counts) / total)}</li>"
        for tier in present
    )
    title = "<h3>Expert requests by where the expert was, over the steps</h3>"
    return f'{title}{figure}<ul class="legend">{legend}</ul>'


def _curve(values: Sequence[int], top: float, css: str) -> str:
    return (
        f'<g class="{css}"><path class="area" d="{svg_plots.line(values, top, area=True)}"/>'
        f'<path class="line" d="{svg_plots.line(values, top)}"/></g>'
    )


def _span(what: str, span: tuple[int, int]) -> str:
    start, end = span
    return f"{what} {start + 1:,}" if end == start + 1 else f"{what}s {start + 1:,} to {end:,}"


def _prompt(group: Sequence[TokenRecord]) -> str:
    tokens = sum(record.tokens_in for record in group if record.phase == "prefill")
    return f" (with {tokens:,} prompt tokens)" if tokens else ""
