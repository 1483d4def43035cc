"""Evaluation from the command line."""

import json
from pathlib import Path

import pytest

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
