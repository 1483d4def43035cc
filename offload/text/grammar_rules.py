"""Rules of grammars that an answer must follow, in llguidance's dialect of Lark."""

import json
import re
from collections.abc import Mapping
from typing import Any

# A model that has lost its way would otherwise write blanks for ever, all of them valid.
_BLANKS = {"whitespace_pattern": r"[ \n\r\t]{1,16}"}
# As json.dumps writes, and so do chat templates, which have a call written anew in the next prompt: what the model has
# written is then found there, and nothing of it is computed again.
_AS_TEMPLATES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def json_rule(name: str, schema: Mapping[str, Any], *, as_templates: bool = False) -> str:
    """Rule ``name`` of a grammar: JSON texts that ``schema`` allows; in the one form of chat templates, or any."""
    form = {"x-guidance": _AS_TEMPLATES if as_templates else _BLANKS}
    return f"{name}: %json {json.dumps({**form, **schema})}"


def thoughts(closing: str, special: Mapping[str, int]) -> list[str]:
    """The rule of thoughts that ``closing`` ends."""
    if not closing:
        return []
    if closing in special:
        return [f"thoughts: /(.|\\n)*/ {spelled(closing, special)} /\\s*/"]
    return [f"thoughts: THOUGHT /\\s*/\nTHOUGHT[lazy]: /(.|\\n)*/ {json.dumps(closing)}"]


def spelled(text: str, special: Mapping[str, int]) -> str:
    """``text`` as a grammar has it: quoted, special tokens by their numbers."""
    if not text:
        return ""
    pattern = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)) or r"(?!)"
    pieces = re.split(f"({pattern})", text)
    return " ".join(f"<[{special[piece]}]>" if piece in special else json.dumps(piece) for piece in pieces if piece)
