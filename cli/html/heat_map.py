"""Which experts were asked for, and where they were: layers down, experts across, a layer's hits beside it.

The script redraws the map in another order from the same data; the classes of its cells are the same there.
"""

import statistics

from cli.html import svg_plots
from cli.html.document import section
from cli.terminal.words import PLACES, TIER_NAMES, percent
from offload.run.report import ExpertMap
from offload.tiers import TIERS, Tier

STEPS = 5  # shades of use
_HEIGHT = 420  # pixels that the layers share, a cell being 8 to 22 high
_PLACES = {**PLACES, "disk": "on disk only"}

_CHOICES = """<div class="choices" hidden>
<fieldset><legend>Experts</legend>
<label><input type="radio" name="across" value="number" checked> by number</label>
<label><input type="radio" name="across" value="use"> most used first</label></fieldset>
<fieldset><legend>Layers</legend>
<label><input type="radio" name="down" value="number" checked> in order</label>
<label><input type="radio" name="down" value="hits"> fewest hits first</label></fieldset></div>"""


def experts_section(experts: ExpertMap) -> str:
    """The map with its legend; empty if there are no experts."""
    if not experts.counts:
        return ""
    note = (
        f"{_skew(experts)} A stronger shade is more use; colour is where the expert was at the end, and those on disk "
        "only are drawn small."
    )
    if experts.requests:
        note += " The bars show where each layer’s requests found their expert."
    choices = (
        _CHOICES
        if experts.requests
        else _CHOICES.replace("<fieldset><legend>Layers", "<fieldset hidden><legend>Layers")
    )
    return section("Experts: use and residency", choices + _figure(experts) + _legend(experts), note=note)


def _skew(experts: ExpertMap) -> str:
    shares = [sum(sorted(row, reverse=True)[: max(1, len(row) // 4)]) / sum(row) for row in experts.counts if sum(row)]
    unused = sum(count == 0 for row in experts.counts for count in row)
    skew = "Nothing was asked for"
    if shares:
        mean = percent(statistics.mean(shares))
        skew = f"The most used quarter of a layer’s experts takes {mean} of its requests"
    return f"{skew}; {unused:,} of {sum(map(len, experts.counts)):,} experts were never asked for."


def _figure(experts: ExpertMap) -> str:
    rows, columns = len(experts.moe_layers), len(experts.counts[0])
    most = max(max(row) for row in experts.counts)
    paths: dict[str, list[str]] = {}
    for y, (counts, tiers) in enumerate(zip(experts.counts, experts.tiers, strict=True)):
        for x, (value, tier) in enumerate(zip(counts, tiers, strict=True)):
            paths.setdefault(_shade(value, most, tier), []).append(_cell(x, y, small=tier == "disk"))
    drawing = "".join(f'<path class="{css}" d="{"".join(cells)}"/>' for css, cells in sorted(paths.items()))
    height = rows * min(22, max(8, _HEIGHT // rows))
    label = f"Heat map of {rows} layers by {columns} experts: use by shade, residency by colour and size"
    hits = _hits(experts, height) if experts.requests else ""
    return (
        f'<figure><div class="scroll" tabindex="0" role="group" aria-label="The map, scrolls sideways where it is '
        f'narrow"><div class="heat{" with-hits" if hits else ""}" style="min-width:{columns * 6 + 150}px;'
        f'max-width:{columns * 30 + 230}px">{svg_plots.y_ticks(svg_plots.every(experts.moe_layers, rows, 24))}'
        f'<div class="canvas" id="heat" tabindex="0" role="img" aria-label="{label}" aria-describedby="heat-readout" '
        f'style="height:{height}px"><svg viewBox="0 0 {columns} {rows}" preserveAspectRatio="none" '
        f'aria-hidden="true"><g>{drawing}</g>'
        '<rect class="cell" width="1" height="1" vector-effect="non-scaling-stroke"/></svg></div>'
        f"{hits}{svg_plots.x_ticks(svg_plots.every(range(columns), columns, 8))}"
        f'<div class="axis">Expert across, layer down</div></div></div>{svg_plots.readout("heat")}</figure>'
    )


def _hits(experts: ExpertMap, height: int) -> str:
    """A bar for each layer: its requests by where the expert was then."""
    paths: dict[Tier, str] = dict.fromkeys(TIERS, "")
    for y, row in enumerate(experts.requests):
        total, left = sum(row.values()), 0.0
        for tier in TIERS:
            width = 100 * row.get(tier, 0) / total if total else 0.0
            if width:
                paths[tier] += f"M{left:.2f} {y + 0.12:g}h{width:.2f}v.76h-{width:.2f}z"
            left += width
    drawing = "".join(f'<g class="{tier}"><path class="solid" d="{d}"/></g>' for tier, d in paths.items() if d)
    rates = [1 - row.get("disk", 0) / (sum(row.values()) or 1) for row in experts.requests]
    label = f"Hits by layer: from {percent(min(rates))} to {percent(max(rates))}"
    return (
        f'<div class="hits" style="height:{height}px" role="img" aria-label="{label}">'
        f'<svg id="hits" viewBox="0 0 100 {len(rates)}" preserveAspectRatio="none" aria-hidden="true">{drawing}</svg>'
        '</div><div class="hits-head">Requests by layer</div>'
    )


def _legend(experts: ExpertMap) -> str:
    present = [tier for tier in TIERS if any(tier in row for row in experts.tiers)]
    ramps = "".join(
        f'<li><span class="ramp {tier}{" small" if tier == "disk" else ""}">'
        + "".join(f'<i class="p{step}"></i>' for step in range(STEPS))
        + f"</span>{_PLACES[tier]}: {sum(row.count(tier) for row in experts.tiers):,}</li>"
        for tier in present
    )
    found = ""
    if experts.requests:
        asked = [tier for tier in TIERS if any(row.get(tier) for row in experts.requests)]
        found = "".join(
            f'<li><span class="swatch {tier}"></span>request found it in {TIER_NAMES[tier]}</li>' for tier in asked
        )
    return f'<ul class="legend">{ramps}{found}</ul>'


def _shade(value: int, most: int, tier: Tier) -> str:
    if not value:
        return f"none {tier}"
    return f"use {tier} p{min(STEPS - 1, int(STEPS * value / (most + 1)))}"


def _cell(x: int, y: int, *, small: bool) -> str:
    inset = 0.22 if small else 0.06
    side = 1 - 2 * inset
    return f"M{x + inset:g} {y + inset:g}h{side:g}v{side:g}h-{side:g}z"
