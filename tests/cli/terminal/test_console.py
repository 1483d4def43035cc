"""What goes to stdout, what to stderr, and what JSON makes of a result."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.table import Table

from cli.terminal.console import Console
from cli.terminal.plain_table import plain_table
from cli.terminal.progress import progress_bar
from offload.documents import SCHEMA_VERSION, to_json


def table(headings: tuple[str, ...], *rows: tuple[str, ...]) -> Table:
    made = plain_table(*headings)
    for row in rows:
        made.add_row(*row)
    return made


@dataclass(frozen=True)
class Pair:
    name: str
    value: float


def test_human_text_goes_to_stderr_only(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.say("hello [not markup]")
    console.step("loading")
    console.notes(["slow disk"])
    console.show(table(("role", "VRAM"), ("experts", "1 GiB")))
    console.result({"a": 1})
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "hello [not markup]\ncoldstream: loading\nnote: slow disk\nrole      VRAM\nexperts  1 GiB\n"


def test_json_silences_human_text_and_prints_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(json=True)
    console.say("hello")
    console.show(table(("role", "VRAM"), ("experts", "1 GiB")))
    with progress_bar(console, "copy", "bytes") as show:
        show(10, 10, "a file")
    console.result({"text": "two\nlines"})
    out, err = capsys.readouterr()
    assert err == ""
    assert out.count("\n") == 1
    assert json.loads(out) == {"schema_version": SCHEMA_VERSION, "text": "two\nlines"}


def test_what_json_cannot_say_becomes_what_it_can() -> None:
    document = {
        "nan": float("nan"),
        "infinite": float("inf"),
        "path": Path("/a/b"),
        3: (1, 2),
        "pair": Pair("x", float("-inf")),
        "nothing": None,
        "yes": True,
    }
    assert json.loads(to_json(document)) == {
        "nan": None,
        "infinite": None,
        "path": "/a/b",
        "3": [1, 2],
        "pair": {"name": "x", "value": None},
        "nothing": None,
        "yes": True,
    }


@pytest.mark.parametrize("width", [24, 40, 60, 100])
def test_no_word_is_broken_however_narrow_the_terminal_is(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    rows = (("Python and its libraries", "500.00 MiB", "400.00 MiB", ""), ("embeddings", "", "1001.98 MiB", "2 %"))
    console = Console()
    console.show(table(("", "VRAM", "only on disk", "share"), *rows))
    err = capsys.readouterr().err
    words = " ".join(" ".join(row) for row in rows).split()
    assert not [word for word in words if word not in err.replace(":", " ").replace(",", " ").split()]
    for number in ("500.00 MiB", "1001.98 MiB", "400.00 MiB"):
        assert number in err
    if ":" in err:  # a sentence a row
        assert "only on disk 1001.98 MiB" in err and len(err.splitlines()) == len(rows)
