"""A report is saved as what its file's name ends in, or the reason why not is one clear line."""

import json
from pathlib import Path

import pytest

from offload.documents import SCHEMA_VERSION, save, to_json
from quant.errors import OutputError
from tests.reports import report


def test_a_report_is_saved_as_json_and_as_a_page(tmp_path: Path) -> None:
    made = report()
    made.save(tmp_path / "run.json")
    document = {"schema_version": SCHEMA_VERSION, **made.to_json()}
    assert json.loads((tmp_path / "run.json").read_text()) == json.loads(to_json(document))
    made.save(str(tmp_path / "run.html"))
    assert (tmp_path / "run.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("run.txt", "run", r"expected \.html or \.json"),
        ("run", "run", "ends in nothing"),
        ("missing/run.json", "run", "found no directory"),
        ("run.html", "a kind that nobody renders", "nothing that makes pages"),
    ],
)
def test_what_cannot_be_saved_is_refused(name: str, kind: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=said):
        save(report(), kind, tmp_path / name)
    assert not (tmp_path / name).exists()


def test_text_that_no_encoding_knows_does_not_lose_the_report(tmp_path: Path) -> None:
    class Odd:
        def to_json(self) -> dict[str, object]:
            return {"text": "a\ud800b"}

    save(Odd(), "run", tmp_path / "run.json")
    assert json.loads((tmp_path / "run.json").read_text())["text"] == "a\ud800b"
