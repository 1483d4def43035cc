"""The page of an evaluation: what it draws is what it says."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cli.html.evaluation import nice_below, render_evaluation
from offload.quality.divergence import Divergence, TokenMeasures
from offload.quality.evaluate import Evaluation
from tests.cli.html.test_run_report import EVIL, outline


def evaluation(agreement: dict[int, float], shift: float = 0.01) -> Evaluation:
    rng = np.random.default_rng(0)
    kl, nll = rng.exponential(0.02, 128), rng.exponential(2.0, 126)
    moved = nll + shift + rng.normal(0, 0.01, 126)
    found = Divergence.of(TokenMeasures(kl, np.ones(128), rng.uniform(0, 1, 128), moved, nll), 64)
    return Evaluation(Path("ours"), Path("theirs"), 2, 64, found, found.to_json(), agreement, None, 1.0)


def test_router_agreement_is_drawn_as_agreement_the_best_layer_on_top() -> None:
    html = render_evaluation(evaluation({0: 1.0, 2: 0.93, 4: 0.97}))
    [dots] = re.findall(r'<path class="dots" d="(.*?)"', html)
    heights = [float(y) for y in re.findall(r"M[\d.]+ ([\d.]+)h0", dots)]
    assert heights[0] < heights[2] < heights[1], "a smaller y is higher up"
    text = outline(html).text
    assert "in common with the reference" in text and "The axis begins at 90 %" in text


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.84, 0.931, 0.99, 0.9995, 1.0])
def test_the_axis_of_agreement_begins_below_every_share(share: float) -> None:
    assert nice_below(share) <= share
    assert nice_below(share) in (0.0, 0.999) or (1 - share) / (1 - nice_below(share)) > 0.2


def test_a_change_that_may_be_chance_is_called_so_and_marked() -> None:
    told, chance = evaluation({}, shift=0.2), evaluation({}, shift=0.0)
    assert "too short to tell" not in outline(render_evaluation(told)).text
    html = render_evaluation(replace(chance, divergence=replace(chance.divergence, log_ratio=0.0)))
    assert "too short to tell" in outline(html).text
    assert '<div class="doubt"><dt>Perplexity' in html


def test_command_and_notes_stay_text() -> None:
    html = render_evaluation(evaluation({0: 0.5}), command_line=EVIL, notes=(EVIL,))
    assert outline(html).tags.count("img") == 0
    assert "alert(1)</script>" not in html.replace("&lt;/script&gt;", "")
