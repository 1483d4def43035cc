"""One self-contained HTML file around a body: style, scripts and data inside it, and nothing asked for outside.

Text and drawings are complete without scripts. Those add the readouts under pointer and arrow keys, the choice
of light or dark, the download of the data, and the comparison with another page's. A content security policy
in the page itself forbids every request.
"""

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from cli.terminal.words import sentence
from offload.documents import PAGE_MARK, SCHEMA_VERSION, to_json
from quant.output_file import save_output

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_SCRIPTS = ("page.js", "heat_map.js", "compare.js")
# C0 controls and DEL have pictures of their own from U+2400 on; a newline and a tab stay what they are.
_PICTURES = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}

Better = Literal["more", "less", ""]
Compared = tuple[str, str, str, Better]  # what it is called, its path in the JSON, its unit, which side is better


def save_page(page: str, path: Path) -> None:
    """Write a page's text to ``path``, where nothing or an earlier page is. Raises OutputError if that cannot be."""
    save_output(path, page.encode("utf-8", "replace"), PAGE_MARK)


def document(
    title: str,
    head: str,
    body: str,
    *,
    report: Mapping[str, Any],
    readouts: Mapping[str, Sequence[str]],
    compared: Sequence[Compared] = (),
) -> str:
    """The page of ``report`` (what its JSON is); ``head`` and ``body`` are HTML.

    ``readouts`` are the words of each drawing's parts by the drawing's name, ``compared`` the figures that are
    set beside those of another page. ``report`` keeps what strings it has as data, never as HTML.
    """
    read = files("cli").joinpath("html", "assets").joinpath
    script = "\n".join(read(name).read_text() for name in _SCRIPTS)
    blocks = (
        _data("report", {"schema_version": SCHEMA_VERSION, **report})
        + _data("readouts", readouts)
        + _data("compared", compared)
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>{PAGE_MARK.decode()}'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<style>\n{read('page.css').read_text()}</style><script>\n{read('theme.js').read_text()}</script></head>"
        f"<body><main><header>{_TOOLS if compared else _TOOLS_ALONE}{head}</header>{body}</main>"
        f"{blocks}<script>\n{script}</script></body></html>\n"
    )


_THEME = '<button type="button" id="theme" title="Light, dark, or as the system says"></button>'
_DOWNLOAD = (
    '<a class="button" id="download" download="report.json" href="#" title="The data of this page">Save JSON</a>'
)
_COMPARE = (
    '<button type="button" id="compare-open" title="Set another report beside this one: its page, or its JSON">'
    'Compare…</button><input type="file" id="compare-file" accept=".html,.json" hidden>'
)
_TOOLS_ALONE = f'<div class="tools">{_DOWNLOAD}{_THEME}</div>'
_TOOLS = f'<div class="tools">{_COMPARE}{_DOWNLOAD}{_THEME}</div>'


def text(said: str) -> str:
    """``said`` as HTML text: nothing in it is markup, and control characters are shown by their pictures."""
    return escape(said.translate(_PICTURES))


def prose(said: str) -> str:
    """``said`` as ``text`` has it, with what stands between backticks as code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", text(said))


def section(title: str, body: str, *, note: str = "", css: str = "") -> str:
    """A card with a heading; ``note`` is plain text under it."""
    said = f'<p class="quiet">{prose(note)}</p>' if note else ""
    return f'<section class="{css}"><h2>{title}</h2>{said}{body}</section>'


def figures(cards: Sequence[tuple[str, str, str, str]], doubtful: Sequence[str] = ()) -> str:
    """A row of cards: (name, value, unit, detail); those whose name is in ``doubtful`` are marked."""
    items = "".join(
        f'<div class="{"doubt" if name in doubtful else ""}"><dt>{text(name)}</dt>'
        f'<dd><div class="value">{text(value)} <span class="unit">{text(unit)}</span></div>'
        f'<div class="detail">{text(detail)}</div></dd></div>'
        for name, value, unit, detail in cards
    )
    return f'<dl class="figures">{items}</dl>'


def banners(doubts: Sequence[str]) -> str:
    """What makes a page's figures unreliable, each in a line that stands out."""
    return "".join(f'<p class="doubt banner">{prose(sentence(doubt))}.</p>' for doubt in doubts)


def facts(rows: Mapping[str, str]) -> str:
    """Names and values, one pair a row; a value that is empty leaves its row out."""
    cells = "".join(
        f'<tr><th scope="row">{text(name)}</th><td class="break">{text(value)}</td></tr>'
        for name, value in rows.items()
        if value
    )
    return f'<table class="facts"><tbody>{cells}</tbody></table>'


def none(said: str) -> str:
    """A sentence that stands where there is nothing to show."""
    return f'<p class="quiet">{prose(sentence(said))}.</p>'


def notes_section(notes: Sequence[str]) -> str:
    """A card with a line for each note."""
    listed = "".join(f"<li>{prose(note)}</li>" for note in notes)
    return section("Notes", f'<ul class="notes">{listed}</ul>' if listed else none("nothing out of the ordinary"))


def _data(name: str, value: object) -> str:
    # json.dumps once more for ASCII: the same bytes whatever the page's reader takes its encoding to be.
    plain = json.dumps(json.loads(to_json({"": value}))[""], separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{plain}</script>'
