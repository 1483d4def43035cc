import json
from pathlib import Path

import pytest

from tests.commands import coldstream, invoke


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_probe_prints_one_json_document_with_the_rates_at_top_level(tmp_path: Path) -> None:
    first = invoke("probe", tmp_path, "--json")
    assert first.returncode == 0 and not first.stderr
    found = json.loads(first.stdout)
    assert found["ram_gb_s"] > 0 and found["disk_gb_s"] > 0 and found["ram_bytes"] > found["ram_gb_s"]
    assert json.loads(invoke("probe", tmp_path, "--json").stdout)["disk_gb_s"] == found["disk_gb_s"]


def test_probe_for_a_human_names_each_memory_and_its_rate(tmp_path: Path) -> None:
    shown = invoke("probe", tmp_path)
    assert shown.stdout == "" and shown.stderr.count("measuring the machine") == 1
    again = invoke("probe", tmp_path)
    assert "measuring" not in again.stderr and "--refresh measures again" in again.stderr
    lines = {line.split()[0]: line for line in shown.stderr.splitlines() if line.strip()}
    assert "GB/s" in lines["RAM"] and "GB/s" in lines["Disk"]


def test_probe_of_no_directory_fails_in_one_line(tmp_path: Path) -> None:
    answer = coldstream("probe", tmp_path / "absent")
    assert answer.returncode == 1 and len(answer.stderr.splitlines()) == 1
