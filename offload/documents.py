"""Reports as files: as JSON, or as the page that an installed renderer makes of them.

Who renders is not imported from here: a distribution names its renderers as entry points of the group
``coldstream.pages``, by the kind of report that each takes and returns the HTML of.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from quant.errors import OutputError
from quant.output_file import save_output

PAGES = "coldstream.pages"
PAGE_MARK = b'<meta name="generator" content="Coldstream">'  # in the head of every page
JSON_MARK = b'{"schema_version"'  # begins every JSON document
_HALF = re.compile("[\ud800-\udfff]")  # of a character: a byte that is no UTF-8, in a path
SCHEMA_VERSION = 1  # of every document; counted up when a key goes or changes its meaning (docs/json.md)


class Document(Protocol):
    """What can be saved."""

    def to_json(self) -> dict[str, Any]:
        """The document as plain data."""


def save(document: Document, kind: str, path: str | Path) -> None:
    """Write ``document``, a report of ``kind``, to ``path``: JSON if it ends in .json, a page if in .html.

    An earlier report there is replaced. Raises OutputError for another ending, for a page that nothing installed
    renders, for a file there that is something else, and if the file cannot be written.
    """
    path = Path(path)
    if path.suffix == ".json":
        mark = JSON_MARK
        text = to_json({"schema_version": SCHEMA_VERSION, **document.to_json()}) + "\n"
    elif path.suffix == ".html":
        from importlib.metadata import entry_points  # takes longer to import than all of --help else

        renderers = list(entry_points(group=PAGES, name=kind))
        if not renderers:
            raise OutputError(f"{path}: found nothing that makes pages: install Coldstream with pip, or name a .json")
        mark, text = PAGE_MARK, renderers[0].load()(document)
    else:
        raise OutputError(f"{path} ends in {path.suffix or 'nothing'}: expected .html or .json")
    save_output(path, text.encode("utf-8", "replace"), mark)


def to_json(document: Mapping[str, Any]) -> str:
    """``document`` on one line of Unicode text; paths become text, NaN and infinity null."""
    text = json.dumps(_plain(document), ensure_ascii=False, allow_nan=False)
    return _HALF.sub(lambda half: f"\\u{ord(half[0]):04x}", text)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
