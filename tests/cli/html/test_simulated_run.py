"""The page of a simulated run: every resource that a token passes has a lane, in words and colours that say what."""

import json
import re

import pytest

from cli.html.simulated_run import LANES, render_replay
from offload.hardware.probe import Machine
from offload.plan.planner import make_plan
from offload.simulator.simulation import Simulation
from quant.model.known_shapes import load_shape
from quant.model.recipe import load_recipe
from quant.model.shape import ModelShape
from tests.cli.html.test_run_report import EVIL, outline
from tests.machines import GIB, RTX_4090, machine

SHAPE = ModelShape.from_config(load_shape("mini-scout"))
SCHEMES = load_recipe("fast").schemes
TIGHT = {"ram": 2 * GIB}


def page(on: Machine, **budgets: int) -> str:
    plan = make_plan(SHAPE, SCHEMES, on, context=1024, **budgets)
    setup = Simulation.of(SHAPE, SCHEMES, plan, on)
    said = {
        "command_line": f"coldstream simulate {EVIL}",
        "about": {"Stored as": EVIL},
        "doubts": (EVIL,),
        "notes": (EVIL,),
    }
    return render_replay(setup, setup.decode(16), setup.prefill(), EVIL, **said)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("on", "budgets", "expected"),
    [
        (machine(), TIGHT, {"RAM", "CPU", "Disk"}),
        (machine(gpu=RTX_4090), {"vram": 2 * GIB, "ram": GIB}, {"VRAM", "RAM", "CPU", "Disk"}),
    ],
    ids=["without a card", "with one"],
)
def test_every_resource_that_a_token_passes_has_a_lane_with_its_unit_and_a_legend(
    on: Machine, budgets: dict[str, int], expected: set[str]
) -> None:
    html = page(on, **budgets)
    lanes = re.findall(r'<div class="plot lanes"><div class="ticks-y" aria-hidden="true">(.*?)</div>', html)
    assert set(re.findall(r">([^<]+)</span>", lanes[0])) == expected
    [axis] = re.findall(r'aria-label="What VRAM|aria-label="What RAM, CPU, disk do over [\d.]+ ms', html)[:1]
    assert axis
    text = outline(html).text
    for said in ("routed experts", "read from disk", "LM head", "ms per decoded token"):
        assert said in text, said
    [data] = re.findall(r'<script type="application/json" id="readouts">(.*?)</script>', html, re.S)
    assert any("Disk: read from disk" in words for words in json.loads(data)["token"])


def test_lanes_are_all_that_the_engine_can_be_busy_with() -> None:
    from offload.simulator.workload import Rates

    assert set(Rates.of(machine(gpu=RTX_4090)).table()) <= set(LANES)


def test_whatever_a_simulation_is_called_it_stays_text() -> None:
    html = page(machine(), **TIGHT)
    parsed = outline(html)
    assert parsed.tags.count("img") == 0
    assert "alert(1)</script>" not in html.replace("&lt;/script&gt;", "")
    whole_words = re.sub(r"</?span>", "", html)  # where a long word of the command may break
    assert not re.search(r"""(https?:)?//[a-z]|\bsrc=(?!x)|@import|url\(""", whole_words.replace("http-equiv", ""))
