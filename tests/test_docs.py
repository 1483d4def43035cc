"""The examples of docs/python.md run as they stand, one after another, on the demo model."""

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT


def test_the_examples_of_the_python_guide_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = (ROOT / "docs" / "python.md").read_text()
    blocks = [
        (text.count("\n", 0, found.start()) + 2, found[1]) for found in re.finditer(r"```python\n(.*?)```", text, re.S)
    ]
    assert len(blocks) >= 6
    names: dict[str, object] = {"__name__": "docs"}
    for line, block in blocks:
        exec(compile("\n" * (line - 1) + block, "docs/python.md", "exec"), names)  # an error names the guide's line
    for made in ("run.html", "run.json", "eval.html"):
        assert (tmp_path / made).stat().st_size > 1000
    assert capsys.readouterr().out
