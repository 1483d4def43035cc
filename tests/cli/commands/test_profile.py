"""Routing profiles from the command line."""

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


def test_a_profile_counts_every_token_in_every_layer(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "routing.json"
    done = invoke("profile", model, "--text", text, "--out", out, "--context", "64", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    document, saved = json.loads(done.stdout), json.loads(out.read_text())
    assert document["tokens"] == saved["tokens"] > 64, "longer than one context"
    assert [sum(row) for row in saved["counts"]] == [saved["tokens"]] * 4
    assert saved["trace"] is None
    assert len(document["skew"]) == 4


def test_merging_adds_and_a_trace_keeps_the_order(model: Path, text: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    invoke("profile", model, "--text", text, "--out", first, "--tokens", "50")
    done = invoke("profile", model, "--text", text, "--out", second, "--tokens", "30", "--merge", first, "--trace")
    assert done.returncode == 0, done.stderr
    saved = json.loads(second.read_text())
    assert saved["tokens"] == 80
    assert len(saved["trace"]) == 30


def test_people_see_skew_and_a_heat_map(model: Path, text: Path, tmp_path: Path) -> None:
    done = invoke("profile", model, "--text", text, "--out", tmp_path / "r.json")
    assert done.stdout == ""
    assert "entropy (of 4.00 bits)" in done.stderr
    assert "█" in done.stderr


def test_a_profile_of_another_model_is_refused_before_any_text_is_run(model: Path, text: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "r.json", tmp_path / "other.json"
    invoke("profile", model, "--text", text, "--out", out, "--tokens", "20")
    other.write_text(json.dumps({**json.loads(out.read_text()), "model_id": "another"}))
    done = invoke("profile", model, "--text", text, "--out", tmp_path / "new.json", "--merge", other)
    assert done.returncode == 1
    assert "another" in done.stderr
    assert not (tmp_path / "new.json").exists()
    generated = invoke("generate", model, "hello", "--routing", other)
    assert generated.returncode == 1
    assert "another" in generated.stderr


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00"], ids=["empty", "not text"])
def test_text_that_is_none_fails_in_one_line(model: Path, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "text"
    file.write_bytes(content)
    done = invoke("profile", model, "--text", file, "--out", tmp_path / "r.json")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("coldstream: error: ")
