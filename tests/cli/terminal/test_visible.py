"""Foreign text on a terminal."""

import unicodedata

import pytest

from cli.terminal.console import Console
from cli.terminal.visible import visible
from offload.documents import to_json

ACTIVE = [
    chr(code) for code in (*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
]


def test_nothing_that_a_terminal_acts_upon_is_left() -> None:
    shown = visible("".join(ACTIVE))
    assert shown.isascii() and shown.isprintable()
    everything = visible("".join(map(chr, range(0x110000))))
    assert {character for character in everything if unicodedata.category(character) == "Cc"} == {"\n", "\t"}
    assert {unicodedata.bidirectional(character) for character in everything}.isdisjoint(
        {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    )


@pytest.mark.parametrize("text", ["", "plain", "two\nlines\tand more", "é 字 😀 עברית ‏", "back\\slash", "👩\u200d🚀"])
def test_text_stays_as_it_is(text: str) -> None:
    assert visible(text) == text


def test_what_is_escaped_can_be_read() -> None:
    assert visible("\x1b[31m\r\x07\x9b\u202e\udce9\ud800") == r"\x1b[31m\x0d\x07\x9b\u202e\xe9\ud800"


@pytest.mark.parametrize("text", ["\x1b[2J", "\x1b]0;title\x07", "over\rwritten", "\x9b31m", "a\u202eb", "\udcff"])
def test_every_way_to_the_terminal_escapes(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console.say(text)
    console.step(text)
    console.notes([text])
    table = Table(title=text)
    table.add_column(text)
    table.add_row(Text(text))
    console.show(table)
    console.write(text)
    out, err = capsys.readouterr()
    assert not set(out + err) & (set(ACTIVE) | {"\udcff"})


def test_json_is_exact_and_always_text(capsys: pytest.CaptureFixture[str]) -> None:
    import json

    console = Console(json=True)
    console.write("nothing")
    console.result({"text": "\x1b[31m\u202e", "path": "/caf\udce9"})
    out, _ = capsys.readouterr()
    out.encode()
    assert json.loads(out)["text"] == "\x1b[31m\u202e"
    assert json.loads(to_json({"path": "/caf\udce9"}))["path"] == "/caf\udce9"
