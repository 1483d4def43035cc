"""What the documents and recipes promise is what a plan says."""

import re
from pathlib import Path

import pytest

from cli.terminal.words import limit_name
from offload.plan.planned_run import planned_model, planned_run
from offload.records import RunOptions
from quant.model.known_shapes import shape_names
from tests.machines import GIB

ROOT = Path(__file__).resolve().parents[3]
CARDS = {"RTX 3060": 12, "RTX 4060 Ti 16GB": 16, "RTX 4090": 24, "RTX 5090": 32}


def rows(page: str, begin: str) -> list[list[str]]:
    """The cells of the table of ``page`` whose heading begins with ``begin``."""
    lines = (ROOT / page).read_text().splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith(begin))
    found = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def test_every_cell_of_models_and_cards_is_what_a_plan_says() -> None:
    model = ""
    for name, ram, *cells in rows("docs/choosing.md", "| | RAM |"):
        model = name.partition(",")[0].lower() or model
        subject = planned_model(model, "fast")
        for (card, vram), cell in zip(CARDS.items(), cells, strict=True):
            options = RunOptions(vram=(vram * 2 - 3) * GIB // 2, ram=int(ram.split()[0]) * GIB * 7 // 8, context=8192)
            plan = planned_run(subject, options, machine=card).plan
            said = f"{plan.predicted_tokens_per_s:#.2g}".rstrip(".")
            assert cell == said + (" (disk)" if plan.limited_by == "disk" else ""), (model, ram, card)
            assert plan.limited_by in ("disk", "ram bandwidth"), (model, ram, card)


@pytest.mark.parametrize("model", ["scout", "maverick"])
def test_recipes_come_to_the_sizes_and_speeds_that_are_documented(model: str) -> None:
    column = {"scout": 2, "maverick": 3}[model]
    checked = 0
    for cells in rows("docs/quality.md", "| recipe | weights |"):
        recipe, cell = cells[0].strip("`"), cells[column]
        found = re.fullmatch(r"([\d.]+) GiB, ([\d.]+)(?: tokens/s)?(?: \((.+)\))?", cell)
        if found:
            run = planned_run(model, RunOptions(ram=56 * GIB), recipe=recipe, machine=found[3] or "RTX 4090")
            assert f"{run.model.file_nbytes / GIB:.1f}" == found[1], recipe
            assert float(f"{run.plan.predicted_tokens_per_s:.3g}") == pytest.approx(float(found[2]), abs=0.051), recipe
            checked += 1
    assert checked >= 3


def test_mavericks_mixture_is_as_fast_as_it_is_said_to_be() -> None:
    run = planned_run("maverick", RunOptions(), recipe="maverick-rtx4090-mixed", machine="RTX 4090")
    speed, size = f"{run.plan.predicted_tokens_per_s:.1f}", f"{run.model.file_nbytes / GIB:.0f} GiB"
    assert float(speed) >= 9
    planning, quality = ((ROOT / "docs" / name).read_text() for name in ("planning.md", "quality.md"))
    assert f"{size} on disk. Planned at {speed} tokens/s" in planning
    assert f"planned at {speed} tokens/s with an RTX 4090" in quality


def test_every_line_of_the_readmes_models_is_what_a_plan_says() -> None:
    found = rows("README.md", "| name | weights")
    assert {cells[0].strip("`") for cells in found} | {"behemoth", "mini-scout", "llama-3.3-70b"} == set(shape_names())
    for name, weights, how, size, speed in found:
        subject = planned_model(name.strip("`"))
        roles, shape = subject.shape.role_nbytes({}), subject.shape
        total = sum(roles.values())
        active = total - roles["experts"] * (1 - shape.top_k / (shape.num_experts or 1)) - roles.get("vision", 0)
        assert weights == ", ".join(f"{count / 2e9:.{0 if count >= 2e10 else 1}f}B" for count in (total, active)), name
        assert how == ("native" if shape.is_native else "transformers"), name
        assert size == f"{subject.file_nbytes / 1e9:.1f} GB", name
        plan = planned_run(subject, RunOptions(vram=45 * GIB // 2, ram=56 * GIB, context=8192), machine="RTX 4090").plan
        assert speed == f"{float(f'{plan.predicted_tokens_per_s:.2g}'):g} tokens/s, {limit_name(plan.limited_by)}", name
