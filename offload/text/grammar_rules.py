"""Rules of grammars that an answer must follow, in llguidance's dialect of Lark."""

import json
import re
from collections.abc import Mapping
from typing import Any

# A model that has lost its way would otherwise write blanks for ever, all of them valid.
_BLANKS = {"x-guidance": {"whitespace_pattern": r"[ \n\r\t]{1,16}"}}


def json_rule(name: str, schema: Mapping[str, Any]) -> str:
    """Rule ``name`` of a grammar: JSON texts that ``schema`` allows."""
    return f"{name}: %json {json.dumps({**_BLANKS, **schema})}"


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
