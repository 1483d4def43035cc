"""What came of choosing bits, as a table for the terminal."""

from typing import TYPE_CHECKING

from cli.terminal.plain_table import plain_table
from offload.tiers import role_name

if TYPE_CHECKING:
    from rich.table import Table

    from quant.allocation.allocate import Allocation
    from quant.allocation.units import Unit


def allocation_table(allocation: "Allocation") -> "Table":
    """Roles down; bits, share of the size, which layers have what, and the loss that is expected."""
    shown = plain_table("weights of", "bits", "share", "least bits' loss", "loss")
    shown.add_column("layers", overflow="fold")
    rows: dict[tuple[str, str], list[int]] = {}
    for index, choice in enumerate(allocation.choices):
        rows.setdefault((choice.unit.role, choice.unit.part), []).append(index)
    for (role, part), indices in rows.items():
        chosen = [allocation.chosen[index] for index in indices]
        nbytes = sum(option.nbytes for _, option in chosen)
        least = sum(allocation.choices[index].options[0].loss for index in indices)
        shown.add_row(
            role_name(role) if part == "all" else f"{role_name(role)} {part}",
            f"{nbytes * 8 / sum(unit.weights for unit, _ in chosen):.3f}",
            f"{nbytes / allocation.nbytes:.1%}",
            f"{least:.4g}",
            f"{sum(option.loss for _, option in chosen):.4g}",
            _layers([(unit, str(option.scheme)) for unit, option in chosen]),
        )
    return shown


def _layers(chosen: "list[tuple[Unit, str]]") -> str:
    """``int8-g128 0-2, int4-g32 3``, or how many experts have each."""
    by_scheme: dict[str, list[Unit]] = {}
    for unit, scheme in chosen:
        by_scheme.setdefault(scheme, []).append(unit)
    if chosen[0][0].expert is not None:
        return ", ".join(f"{scheme} {len(units):,} experts" for scheme, units in by_scheme.items())
    named = {scheme: _runs([u.layer for u in units if u.layer is not None]) for scheme, units in by_scheme.items()}
    return ", ".join(f"{scheme} {layers}".strip() for scheme, layers in named.items())


def _runs(layers: list[int]) -> str:
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return " ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)
