"""RunReport: what its JSON promises to whoever reads it."""

import json

from cli.terminal.console import to_json
from offload.records import TokenRecord
from offload.run.report import ExpertRequests
from tests.reports import report


def test_the_json_has_every_key_that_is_promised() -> None:
    data = json.loads(to_json(report(tokens=50, vram=0.3).to_json()))
    assert data["prefill"]["tokens_per_s"] > 0
    for key in ("tokens_per_s", "ms_per_token_p50", "ms_per_token_p90", "floor_ms_per_token", "fraction_of_floor"):
        assert data["decode"][key] > 0, key
    for tier in ("ram", "disk", "pcie", "vram"):
        assert data["bandwidth"][f"{tier}_gb_s"] > 0, tier
    for tier in ("vram", "ram", "disk"):
        assert sum(data["memory"][tier].values()) > 0, tier
        assert data["bandwidth"]["achieved"][f"{tier}_gb_s"] > 0, tier
        assert data["experts"]["by_tier"][tier] > 0, tier
    assert data["memory"]["peak_rss_bytes"] > 0
    assert data["experts"]["hits"] == data["experts"]["by_tier"]["vram"] + data["experts"]["by_tier"]["ram"]
    assert data["experts"]["misses"] == data["experts"]["by_tier"]["disk"]
    assert data["plan"]["predicted_tokens_per_s"] > 0
    assert data["environment"]["versions"]["torch"]
    assert {"cpu", "gpu", "kernel"} <= data["environment"].keys()
    assert isinstance(data["notes"], list)


def test_what_a_machine_does_not_have_is_null_and_not_zero() -> None:
    bandwidth = report(tokens=5).to_json()["bandwidth"]
    assert bandwidth["vram_gb_s"] is None
    assert bandwidth["pcie_gb_s"] is None
    assert bandwidth["achieved"]["vram_gb_s"] is None


def test_the_timeline_has_one_entry_per_step_in_every_column() -> None:
    columns = report(tokens=30).history()
    assert {len(values) for values in columns.values()} == {31}
    assert columns["phase"][:2] == ["prefill", "decode"]


def test_requests_are_counted_by_the_tier_that_held_the_expert() -> None:
    steps = [
        TokenRecord("prefill", 0, "", 9, 1.0, {"ram": 3, "disk": 5}),
        TokenRecord("decode", 0, "", 1, 1.0, {"vram": 2, "ram": 2}),
    ]
    requests = ExpertRequests.of(steps)
    assert (requests.hits, requests.misses, requests.hit_rate) == (7, 5, 7 / 12)
    assert ExpertRequests.of([]).hit_rate is None


def test_a_note_is_told_once_however_often_it_arose() -> None:
    assert report(tokens=5, notes=("slow", "slow", "odd")).notes == ("slow", "odd")
