"""Plots of the report page: inline SVG that stretches, and text outside it that does not.

Legend: x runs 0..1000 over the bins of a drawing, y 0..100 downward; a *tick* is (place 0..1, label).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from offload.run.report import ExpertMap
from offload.tiers import Tier

Tick = tuple[float, str]
WIDTH, HEIGHT = 1000, 100
STEPS = 5  # shades of use in the heat map


@dataclass(frozen=True)
class Bins:
    """``count`` steps grouped so that at most ``limit`` bars are drawn."""

    count: int
    limit: int = 240

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(start, end) of each group."""
        size = max(1, math.ceil(self.count / self.limit))
        return [(start, min(start + size, self.count)) for start in range(0, self.count, size)]

    def ticks(self) -> list[Tick]:
        """Where round step numbers fall, the first and last step always named."""
        if self.count < 2:
            return [(0.0, "1")]
        inner = [value for value in nice_ticks(self.count, 5) if 0.06 < value / self.count < 0.9]
        return [(0.0, "1"), *((value / self.count, f"{value:,.0f}") for value in inner), (1.0, f"{self.count:,}")]


def nice_ticks(top: float, about: int = 4) -> list[float]:
    """About ``about`` round values from 0 up to ``top``."""
    if top <= 0:
        return [0.0]
    raw = top / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw)
    return [step * index for index in range(int(top / step + 1e-9) + 1)]


def bars(lows: Sequence[float], highs: Sequence[float], top: float) -> str:
    """Path of one bar per bin from ``lows`` to ``highs`` (values, ``top`` is the upper edge)."""
    width = WIDTH / max(len(lows), 1)
    gap = width * 0.12 if len(lows) <= 120 else 0
    parts = []
    for index, (low, high) in enumerate(zip(lows, highs, strict=True)):
        left, upper = index * width + gap / 2, _y(high, top)
        height = max(_y(low, top) - upper, 0.6 if high > 0 else 0)
        if height:
            parts.append(f"M{left:.1f} {upper:.1f}h{width - gap:.1f}v{height:.1f}h-{width - gap:.1f}z")
    return "".join(parts)


def line(values: Sequence[float], top: float, *, area: bool = False) -> str:
    """Path through the middles of the bins; with ``area`` closed down to zero."""
    if not values:
        return ""
    width = WIDTH / len(values)
    points = [((index + 0.5) * width, _y(value, top)) for index, value in enumerate(values)]
    points = [(0.0, points[0][1]), *points, (float(WIDTH), points[-1][1])]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f"{path}L{WIDTH} {HEIGHT}L0 {HEIGHT}z" if area else path


def level(value: float, top: float, css: str) -> str:
    """A horizontal rule at ``value``."""
    return f'<path class="{css}" d="M0 {_y(value, top):.1f}H{WIDTH}"/>'


def tag(value: float, top: float, text: str, *, under: bool = False) -> str:
    """Text at the right end of a rule at ``value``."""
    css = "tag under" if under else "tag"
    return f'<span class="{css}" style="top:{_y(value, top):.1f}%">{escape(text)}</span>'


def plot(
    name: str, drawing: str, *, label: str, x: Iterable[Tick], y: Iterable[Tick], tags: str = "", css: str = ""
) -> str:
    """A drawing with its axes and readout; ``label`` says in words what it shows."""
    y = list(y)
    grid = "".join(f'<path class="grid" d="M0 {HEIGHT * (1 - place):.1f}H{WIDTH}"/>' for place, _ in y)
    return (
        f'<figure><div class="plot">{_y_ticks((1 - place, text) for place, text in y)}'
        f'<div class="canvas {css}" tabindex="0" role="img" aria-label="{escape(label)}" '
        f'data-readout="{name}" aria-describedby="{name}-readout">'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" aria-hidden="true">{grid}{drawing}'
        f'</svg>{tags}<div class="cursor"></div></div>{_x_ticks(x, "ends")}</div>'
        f"{_readout(name)}</figure>"
    )


def heat_map(experts: ExpertMap) -> str:
    """Every expert's use (shade) and residency (colour; small squares are on disk), longer side across."""
    layers, count = len(experts.moe_layers), len(experts.counts[0]) if experts.counts else 0
    by_layer = layers > count
    columns, rows = (layers, count) if by_layer else (count, layers)
    most = max((value for row in experts.counts for value in row), default=0)
    paths: dict[str, list[str]] = {}
    for index, (counts, tiers) in enumerate(zip(experts.counts, experts.tiers, strict=True)):
        for expert, (value, tier) in enumerate(zip(counts, tiers, strict=True)):
            x, y = (index, expert) if by_layer else (expert, index)
            paths.setdefault(_shade(value, most, tier), []).append(_square(x, y, small=tier == "disk"))
    drawing = "".join(f'<path class="{css}" d="{"".join(cells)}"/>' for css, cells in sorted(paths.items()))
    numbers = [str(layer) for layer in experts.moe_layers]
    across, down = (numbers, range(count)) if by_layer else (range(count), numbers)
    size = min(28, max(8, 1000 // max(columns, 1)))
    label = f"Heat map of {layers} layers by {count} experts: use by shade, residency by colour and size"
    return (
        f'<figure><div class="scroll"><div class="heat" style="min-width:{columns * 7 + 40}px;'
        f'max-width:{columns * size + 46}px">{_y_ticks(_every(down, rows, 14))}'
        f'<div class="canvas" id="heat" tabindex="0" role="img" aria-label="{label}" '
        f'aria-describedby="heat-readout" data-across="{"layers" if by_layer else "experts"}">'
        f'<svg viewBox="0 0 {columns} {rows}" aria-hidden="true">{drawing}'
        '<rect class="cell" width="1" height="1" vector-effect="non-scaling-stroke"/></svg></div>'
        f'{_x_ticks(_every(across, columns, 20))}<div class="axis">{"Layer" if by_layer else "Expert"} '
        f"across, {'expert' if by_layer else 'layer'} down</div></div></div>{_readout('heat')}</figure>"
    )


def segments(parts: Sequence[tuple[str, int]], tier: Tier, scale: int) -> str:
    """A stacked bar of (role, bytes), as wide as its sum is of ``scale``; the largest role is the darkest."""
    total = sum(size for _, size in parts)
    items = "".join(
        f'<i class="{tier}" style="flex:{size} 1 0;--part:{shade(index)}%" title="{escape(role)}"></i>'
        for index, (role, size) in enumerate(parts)
        if size
    )
    width = 100 * total / scale if scale else 0
    inner = f'<div class="bar" style="flex:0 0 {width:.2f}%">{items}</div>'
    return f'<div class="bar" aria-hidden="true">{inner}</div>'


def shade(index: int) -> int:
    """Strength in percent of the ``index``-th largest role's colour."""
    return (100, 74, 56, 44, 36, 30)[min(index, 5)]


def track(part: float, css: str, *, thin: bool = False) -> str:
    """A bar filled to ``part`` of its length."""
    width = 100 * min(max(part, 0.0), 1.0)
    css += " thin" if thin else ""
    return f'<div class="track {css}" aria-hidden="true"><i style="width:{width:.2f}%"></i></div>'


def _shade(value: int, most: int, tier: Tier) -> str:
    if not value:
        return f"none {tier}"
    return f"use {tier} p{min(STEPS - 1, int(STEPS * value / (most + 1)))}"


def _square(x: int, y: int, *, small: bool) -> str:
    inset = 0.22 if small else 0.06
    side = 1 - 2 * inset
    return f"M{x + inset:g} {y + inset:g}h{side:g}v{side:g}h-{side:g}z"


def _y(value: float, top: float) -> float:
    return HEIGHT * (1 - min(max(value / top, 0.0), 1.0)) if top else float(HEIGHT)


def _every(labels: Iterable[object], count: int, most: int) -> list[Tick]:
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128, 10**9) if count / step <= most)
    return [((i + 0.5) / count, str(text)) for i, text in enumerate(labels) if i % step == 0]


def _y_ticks(ticks: Iterable[Tick]) -> str:
    return (
        '<div class="ticks-y" aria-hidden="true">'
        + "".join(f'<span style="top:{100 * place:.2f}%">{escape(text)}</span>' for place, text in ticks)
        + "</div>"
    )


def _x_ticks(ticks: Iterable[Tick], css: str = "") -> str:
    return (
        f'<div class="ticks-x {css}" aria-hidden="true">'
        + "".join(f'<span style="left:{100 * place:.2f}%">{escape(text)}</span>' for place, text in ticks)
        + "</div>"
    )


def _readout(name: str) -> str:
    return f'<p class="readout" id="{name}-readout" role="status"></p>'
