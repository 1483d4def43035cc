"""Plots of the report page: inline SVG that stretches, and text outside it that does not.

Legend: x runs 0..1000 over the bins of a drawing, y 0..100 downward; a *tick* is (place 0..1, label).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

Tick = tuple[float, str]
WIDTH, HEIGHT = 1000, 100
_NEAR = 0.3  # of a plot's height: two lines of text on the lowest plot


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
        round_ones = [value for value in nice_ticks(self.count, 5) if value >= 2 and value.is_integer()]
        inner = [value for value in round_ones if 0.06 < value / self.count < 0.9]
        return [(0.0, "1"), *((value / self.count, f"{value:,.0f}") for value in inner), (1.0, f"{self.count:,}")]


def nice_ticks(top: float, about: int = 4) -> list[float]:
    """About ``about`` round values from 0 up to ``top``."""
    if top <= 0:
        return [0.0]
    raw = top / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw)
    return [step * index for index in range(int(top / step + 1e-9) + 1)]


def value_ticks(top: float, unit: str = "", scale: float = 1) -> list[Tick]:
    """Round values up to ``top`` on the axis of a plot that ends there, each times ``scale`` in ``unit``."""
    return [(value / top, f"{scale * value:g}{unit}") for value in nice_ticks(top)]


def bars(lows: Sequence[float], highs: Sequence[float], top: float, *, narrow: bool = False) -> str:
    """Path of one bar per bin from ``lows`` to ``highs`` (values, ``top`` is the upper edge).

    ``narrow`` bars let wide ones behind them be seen.
    """
    width = WIDTH / max(len(lows), 1)
    gap = width * 0.5 if narrow else width * 0.12 if len(lows) <= 120 else 0
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


def dots(values: Sequence[float], top: float) -> str:
    """Path of a dot in the middle of every bin: lines without length, whose round ends keep their shape."""
    width = WIDTH / max(len(values), 1)
    return "".join(f"M{(index + 0.5) * width:.1f} {_y(value, top):.1f}h0" for index, value in enumerate(values))


def level(value: float, top: float, css: str) -> str:
    """A horizontal rule at ``value``."""
    return f'<path class="{css}" d="M0 {_y(value, top):.1f}H{WIDTH}"/>'


def tags(marks: Sequence[tuple[float, str]], top: float) -> str:
    """Texts on the rules at one or two values: the first at its right end, the second at its left. A rule in the upper
    part has its text below. Where two are near, both texts lie on one side, and one farther off: on a narrow screen
    they are longer than the plot is wide."""
    highest, lowest = (end((value for value, _ in marks), default=0.0) for end in (max, min))
    near = len(marks) > 1 and highest - lowest < _NEAR * top
    made = ""
    for index, (value, text) in enumerate(marks):
        under = (highest if near else value) > 0.8 * top
        far = near and value == (lowest if under else highest) and (index == 0 or highest > lowest)
        css = f"tag{' left' if index else ''}{' under' if under else ''}{' far' if far else ''}"
        made += f'<span class="{css}" style="top:{_y(value, top):.1f}%">{escape(text)}</span>'
    return made


def plot(
    name: str, drawing: str, *, label: str, x: Iterable[Tick], y: Iterable[Tick], tags: str = "", css: str = ""
) -> str:
    """A drawing with its axes and readout; ``label`` says in words what it shows."""
    y = list(y)
    grid = "".join(f'<path class="grid" d="M0 {HEIGHT * (1 - place):.1f}H{WIDTH}"/>' for place, _ in y)
    return (
        f'<figure><div class="plot {css}">{y_ticks((1 - place, text) for place, text in y)}'
        f'<div class="canvas" tabindex="0" role="img" aria-label="{escape(label)}" '
        f'data-readout="{name}" aria-describedby="{name}-readout">'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" aria-hidden="true">{grid}{drawing}'
        f'</svg>{tags}<div class="cursor"></div></div>{x_ticks(x)}</div>'
        f"{readout(name)}</figure>"
    )


def stacked(parts: Sequence[tuple[str, str, float, str]], label: str) -> str:
    """One bar of parts that add up to it, and its legend; a part is (css, name, share of 1, value in words)."""
    items = legend = ""
    for css, name, part, value in parts:
        said = f"{escape(name)}: {escape(value)}"
        inner = f"<b>{100 * part:.0f} %</b>" if part > 0.07 else ""
        items += f'<i class="{css}" style="flex:{part:.5f} 1 0" title="{said}">{inner}</i>'
        legend += f'<li><span class="swatch {css}"></span>{said}</li>'
    bar = f'<div class="bar tall" role="img" aria-label="{escape(label)}">{items}</div>'
    return f'{bar}<ul class="legend">{legend}</ul>'


def track(part: float, css: str, *, thin: bool = False) -> str:
    """A bar filled to ``part`` of its length."""
    width = 100 * min(max(part, 0.0), 1.0)
    css += " thin" if thin else ""
    return f'<div class="track {css}" aria-hidden="true"><i style="width:{width:.2f}%"></i></div>'


def _y(value: float, top: float) -> float:
    return HEIGHT * (1 - min(max(value / top, 0.0), 1.0)) if top else float(HEIGHT)


def every(labels: Iterable[object], count: int, most: int) -> list[Tick]:
    """As many of ``count`` evenly spaced ``labels`` as ``most``."""
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128, 10**9) if count / step <= most)
    return [((i + 0.5) / count, str(text)) for i, text in enumerate(labels) if i % step == 0]


def y_ticks(ticks: Iterable[Tick]) -> str:
    """Labels down the left side; places count from the top."""
    return (
        '<div class="ticks-y" aria-hidden="true">'
        + "".join(f'<span style="top:{100 * place:.2f}%">{escape(text)}</span>' for place, text in ticks)
        + "</div>"
    )


def x_ticks(ticks: Iterable[Tick]) -> str:
    """Labels below, each in the middle of its place, except at the very ends."""
    ends = {0.0: "first", 1.0: "last"}
    return (
        '<div class="ticks-x" aria-hidden="true">'
        + "".join(
            f'<span class="{ends.get(place, "")}" style="left:{100 * place:.2f}%">{escape(text)}</span>'
            for place, text in ticks
        )
        + "</div>"
    )


def readout(name: str) -> str:
    """Where the words of what is pointed at go."""
    return f'<p class="readout" id="{name}-readout" role="status"></p>'
