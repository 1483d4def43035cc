"""The demo: the whole path in one command."""

import json
import time
from pathlib import Path

import pytest

from tests.commands import coldstream, invoke


def test_the_demo_runs_all_steps_within_a_minute_and_leaves_what_it_is_asked_to(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    started = time.perf_counter()
    done = coldstream("demo", "--keep", kept)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - started < 60
    assert done.stdout == ""
    for command in ("quantize", "profile", "plan", "generate"):
        assert f"$ coldstream {command} " in done.stderr
    assert (kept / "model" / "config.json").exists()
    assert "Decode runs at" in (kept / "run.html").read_text()
    assert json.loads((kept / "routing.json").read_text())["tokens"] > 1000


def test_the_demos_json_has_the_result_of_every_step_and_a_second_demo_replaces_the_first(tmp_path: Path) -> None:
    assert invoke("demo", "--keep", tmp_path / "made").returncode == 0
    done = invoke("demo", "--json", "--keep", tmp_path / "made")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    document = json.loads(done.stdout)
    assert document["quantize"]["output_bytes"] < document["quantize"]["source_bytes"]
    assert document["plan"]["predicted_tokens_per_s"] > 0
    assert document["generate"]["decode"]["tokens_per_s"] > 0


@pytest.mark.parametrize("name", ["thesis.txt", "model/thesis.txt", "run.html", "routing.json", "model.partial/thesis"])
def test_a_folder_with_something_in_it_is_not_touched(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("years of work")
    done = invoke("demo", "--keep", tmp_path)
    assert done.returncode == 1
    assert "not empty" in done.stderr or "not of this kind" in done.stderr
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [tmp_path / name]
