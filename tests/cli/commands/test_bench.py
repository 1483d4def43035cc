"""The benchmark from the command line."""

import json
from pathlib import Path

import pytest

from tests.commands import invoke

SMALL = ["--prompt-tokens", "40", "--tokens", "6", "--repeat", "2"]


@pytest.fixture(scope="module")
def document(model: Path) -> dict[str, dict[str, object]]:
    done = invoke("bench", model, *SMALL, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def test_prefill_and_decode_are_counted_apart_and_the_warm_up_not_at_all(
    document: dict[str, dict[str, object]],
) -> None:
    assert document["prefill"]["tokens"] == 2 * 40
    assert document["decode"]["tokens"] == 2 * 6


def test_every_promised_key_is_there(document: dict[str, dict[str, object]]) -> None:
    promised = {
        "prefill": ["tokens_per_s"],
        "decode": ["tokens_per_s", "ms_per_token_p50", "floor_ms_per_token", "fraction_of_floor"],
        "bandwidth": ["ram_gb_s", "disk_gb_s", "pcie_gb_s", "vram_gb_s"],
        "memory": ["vram", "ram", "disk", "peak_rss_bytes"],
        "experts": ["hits", "misses", "by_tier"],
        "plan": ["predicted_tokens_per_s", "predicted_prefill_tokens_per_s"],
        "environment": ["versions", "cpu", "gpu", "kernel"],
    }
    for part, keys in promised.items():
        assert set(keys) <= document[part].keys(), part
    assert document["notes"] is not None


def test_drafts_are_measured_by_tasks(model: Path) -> None:
    done = invoke("bench", model, *SMALL, "--tokens", "30", "--draft", "ngram", "--draft-errors", "0.2", "--json")
    assert done.returncode == 0, done.stderr
    draft = json.loads(done.stdout.splitlines()[-1])["draft"]
    assert set(draft["tasks"]) == {"free", "quote", "edit", "recorded"}
    recorded = draft["tasks"]["recorded"]
    assert recorded["kind"] == "recorded" and 0.3 < recorded["acceptance"] <= 1
    for task in draft["tasks"].values():
        assert task["speedup"] == pytest.approx(task["tokens_per_s"] / task["plain_tokens_per_s"])
    assert draft["drafted"] == sum(task["drafted"] for task in draft["tasks"].values())


def test_a_long_context_need_not_be_computed_and_is_not_kept_on_disk(model: Path, tmp_path: Path) -> None:
    done = invoke("bench", model, *SMALL, "--filled", "300", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["filled"] == 300 and found["context"] >= 300 + 40 + 6
    assert found["prefill"]["tokens"] == 2 * 40 and found["prefill"]["reused"]["memory"] == 2 * 300
    refused = invoke("bench", model, *SMALL, "--filled", "300", "--prompt-cache", tmp_path)
    assert refused.returncode == 2 and "--filled puts random keys" in refused.stderr
    assert not any(tmp_path.iterdir())


def test_the_floor_is_below_the_measurement(document: dict[str, dict[str, object]]) -> None:
    fraction = document["decode"]["fraction_of_floor"]
    assert isinstance(fraction, float)
    assert 0 < fraction < 1


def test_roles_in_ram_explain_what_the_system_counts(document: dict[str, dict[str, object]]) -> None:
    memory = document["memory"]
    ram, resident, rest = memory["ram"], memory["rss_bytes"], memory["unaccounted_bytes"]
    assert isinstance(ram, dict)
    assert isinstance(resident, int)
    assert isinstance(rest, int)
    assert sum(ram.values()) + rest == resident


def test_people_see_both_speeds_with_their_spread_and_the_page_is_written(model: Path, tmp_path: Path) -> None:
    page = tmp_path / "run.html"
    done = invoke("bench", model, *SMALL, "--report", page)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "runs from" in done.stderr
    assert page.read_text().startswith("<!doctype html>")


def test_a_prompt_is_computed_and_then_read_from_the_prompt_cache(model: Path, tmp_path: Path) -> None:
    words = ("bench", model, "--prompt-tokens", "300", "--tokens", "2", "--repeat", "1", "--prompt-cache", tmp_path)
    for _ in range(2):  # what the first has kept does not make the second faster
        done = invoke(*words, "--json")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["prefill"]["tokens"] == 300 and found["prefill"]["hit_rate"] == 0
        assert found["prompt_cache"]["tokens"] == 256 and found["prompt_cache"]["speedup"] > 0


def test_several_sequences_are_measured_each_number_beside_its_floor(model: Path, tmp_path: Path) -> None:
    page = tmp_path / "several.html"
    done = invoke("bench", model, *SMALL, "--sequences", "1,3", "--arriving", "40", "--report", page, "--json")
    found = json.loads(done.stdout.splitlines()[-1])
    assert [row["n"] for row in found["sequences"]] == [1, 3]
    for row in found["sequences"]:
        assert row["floor_ms_per_step"] > 0 and row["floor_limited_by"] in ("ram bandwidth", "compute", "disk")
    assert found["sequences"][1]["per_sequence_tokens_per_s"] < found["sequences"][1]["tokens_per_s"]
    assert found["arrival"]["sequences"] == 3 and found["arrival"]["first_token_s"] > 0
    assert "Sequences that shared steps" in page.read_text()


@pytest.mark.parametrize("asked", ["0", "17", "1,,2", "two", "-1", "1;2", ""])
def test_numbers_of_sequences_that_cannot_be_are_one_line(model: Path, asked: str) -> None:
    done = invoke("bench", model, f"--sequences={asked}")
    assert done.returncode == 2
    assert "expected numbers from 1 to 16" in done.stderr


def test_the_same_directory_by_transformers_and_accelerate_stands_beside_it(model: Path) -> None:
    done = invoke("bench", model, *SMALL, "--repeat", "1", "--against", "accelerate", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])["against"]
    assert found["engine"].startswith("transformers ") and found["failed"] is None
    assert found["tokens_per_s"] > 0 and found["prefill_tokens_per_s"] > 0 and found["placed"]["ram"] > 0
    done = invoke("bench", model, *SMALL, "--repeat", "1", "--against", "accelerate", "--ram", "1GiB")
    said = " ".join((done.stdout + done.stderr).split())
    assert "times as fast" in said and "which bounds its map alone" in said
