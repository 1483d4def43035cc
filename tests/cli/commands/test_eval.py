"""Evaluation from the command line."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from cli.html.evaluation import render_evaluation
from offload.quality.divergence import Divergence, TokenMeasures
from offload.quality.evaluate import Evaluation
from quant.convert.quantize import quantize
from tests import images
from tests.cli.html.test_run_report import EVIL, outline
from tests.commands import invoke

TEXT = "import os\n\ndef join(path, *paths):\n    return os.sep.join([path, *paths])\n" * 12


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.py"
    file.write_text(TEXT)
    return file


def test_eval_ends_with_one_json_document(model: Path, text: Path, tmp_path: Path) -> None:
    asked = ("--reference", model, "--text", text, "--windows", "2", "--context", "32", "--cache", tmp_path)
    done = invoke("eval", model, *asked, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["tokens"] == 64
    assert document["kl_p99"] >= document["kl_median"] >= 0
    assert document["floor"]["kl_mean"] > 0
    assert len(document["router_agreement"]) == 4


def test_people_see_tables_and_bars(model: Path, text: Path, tmp_path: Path) -> None:
    asked = ("--reference", model, "--text", text, "--windows", "2", "--context", "32", "--cache", tmp_path)
    done = invoke("eval", model, *asked)
    assert done.stdout == ""
    for part in ("noise floor", "KL median", "By how sure", "█", "Experts in common"):
        assert part in done.stderr


def test_a_short_text_is_one_line(model: Path, text: Path, tmp_path: Path) -> None:
    done = invoke("eval", model, "--reference", model, "--text", text, "--cache", tmp_path)
    assert done.returncode != 0
    assert "expected at least 32; give a longer text" in done.stderr


def test_windows_longer_than_the_model_was_made_for_are_a_note(model: Path, demo_model: Path, tmp_path: Path) -> None:
    asked = ("--reference", model, "--text", demo_model / "held_out.txt", "--windows", "1")
    done = invoke("eval", model, *asked, "--context", "1030", "--cache", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    [note] = json.loads(done.stdout)["notes"]
    assert "1,030 tokens is beyond the 1,024" in note


def test_the_report_page_draws_what_the_document_says(model: Path, text: Path, tmp_path: Path) -> None:
    page = tmp_path / "eval.html"
    asked = ("--reference", model, "--text", text, "--windows", "2", "--context", "32", "--cache", tmp_path)
    done = invoke("eval", model, *asked, "--kv", "int8", "--report", page, "--json")
    assert done.returncode == 0, done.stderr
    html = page.read_text()
    [data] = re.findall(r'<script type="application/json" id="report">(.*?)</script>', html, re.S)
    document = json.loads(done.stdout.splitlines()[-1])
    assert json.loads(data) == document
    assert document["kv"] == "int8" and "int8 KV cache" in outline(html).text
    assert len(document["by_position"]) == 16
    [readouts] = re.findall(r'<script type="application/json" id="readouts">(.*?)</script>', html, re.S)
    drawn = json.loads(readouts)
    assert len(drawn["position"]) == 16 and len(drawn["routing"]) == 4
    assert len(drawn["spread"]) == len(document["histogram"])
    assert len(drawn["confidence"]) == len(document["buckets"])


def test_a_page_asks_for_nothing_outside_itself_and_names_stay_text(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    kl, nll = rng.exponential(0.02, 128), rng.exponential(2.0, 126)
    measures = TokenMeasures(kl, np.ones(128), rng.uniform(0, 1, 128), nll + 0.01, nll)
    found = Divergence.of(measures, 64)
    names = Path(EVIL.replace("/", "")), Path("source")
    page = render_evaluation(Evaluation(*names, 2, 64, found, found.to_json(), {0: 0.9, 2: 1.0}, None, 1.0))
    parsed = outline(page)
    assert parsed.tags.count("img") == 0 and parsed.tags.count("svg") == 4
    assert not re.search(r"""(https?:)?//[a-z]|\bsrc=(?!x)|@import|url\(""", page.replace("http-equiv", ""))
    assert "default-src 'none'" in page
    assert f"{found.kl_mean:.4f} nats of KL divergence per token" in parsed.text


def test_a_report_that_cannot_be_written_is_refused_before_the_run(model: Path, text: Path, tmp_path: Path) -> None:
    page = tmp_path / "no" / "such.html"
    done = invoke("eval", model, "--reference", model, "--text", text, "--report", page)
    assert done.returncode != 0 and "found no directory" in done.stderr


def test_what_rounding_a_tower_did_to_pictures_is_measured_and_that_it_was_not_is_said(
    text: Path, tmp_path: Path
) -> None:
    source = images.make_model(tmp_path / "source")
    quantize(source, tmp_path / "int8", vision="int8-g32")
    images.picture(100, 30).save(tmp_path / "seen.png")
    asked = ("--reference", source, "--text", text, "--windows", "1", "--context", "32", "--cache", tmp_path, "--json")
    blind = json.loads(invoke("eval", tmp_path / "int8", *asked).stdout)
    assert "images" not in blind and "vision tower is int8-g32" in blind["notes"][0]
    seen = json.loads(invoke("eval", tmp_path / "int8", *asked, "--image", tmp_path / "seen.png").stdout)
    assert "notes" not in seen and seen["images"]["rows"] == 20
    assert 1e-3 < seen["images"]["relative_error"] < 0.03 and 0.999 < seen["images"]["cosine_min"] < 1
    same = json.loads(invoke("eval", source, *asked, "--image", tmp_path / "seen.png").stdout)
    assert same["images"]["relative_error"] == 0
    refused = invoke("eval", source, *asked, "--image", text)
    assert refused.returncode == 1 and "text.py" in refused.stderr
