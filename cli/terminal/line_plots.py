"""Curves of several series over one axis, drawn with letters in the terminal."""

import textwrap
from collections.abc import Mapping, Sequence


def curves(x: Sequence[float], series: Mapping[str, Sequence[float]], *, width: int = 64, height: int = 14) -> str:
    """``series`` of values from 0 to 1 over ``x`` (ascending, from 0 to 1), each drawn with its own letter.

    Where several meet, the last one is seen. The legend stands below.
    """
    letters = _letters(series)
    grid = [[" "] * width for _ in range(height)]
    for name, values in series.items():
        for column in range(width):
            place = (column + 0.5) / width
            if x and x[0] <= place <= x[-1]:
                row = height - 1 - min(height - 1, int(_at(place, x, values) * height))
                grid[row][column] = letters[name]
    lines = []
    for row, cells in enumerate(grid):
        top = row == 0
        label = "100 %" if top else " 50 %" if row == height // 2 else "  0 %" if row == height - 1 else ""
        lines.append(f"{label:>6} │{''.join(cells).rstrip()}")
    lines.append(f"{'':>6} └{'─' * width}")
    lines.append(f"{'':>8}{'0 %':<{width // 2 - 2}}{'50 %':<{width // 2 - 3}}100 %")
    legend = "   ".join(f"{letter}\N{NO-BREAK SPACE}{name}" for name, letter in letters.items())
    lines += textwrap.wrap(legend, width, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines)


def _letters(names: Mapping[str, object]) -> dict[str, str]:
    """A letter of each name that no name before it has."""
    letters: dict[str, str] = {}
    for name in names:
        free = [letter for letter in (*name, *name.upper()) if letter not in letters.values()]
        letters[name] = free[0] if free else "*"
    return letters


def _at(place: float, x: Sequence[float], values: Sequence[float]) -> float:
    for index in range(1, len(x)):
        if place <= x[index]:
            part = (place - x[index - 1]) / (x[index] - x[index - 1])
            return values[index - 1] + part * (values[index] - values[index - 1])
    return values[-1]
