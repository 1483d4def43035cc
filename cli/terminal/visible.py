"""Text of foreign make, shown so that the terminal does nothing but show it.

Names in a checkpoint, paths, metadata and what a model writes may hold any character. Those that a terminal
acts upon (ESC, CR, BEL, the C1 controls) and those that reorder what stands beside them (the Unicode
bidirectional embeddings, overrides and isolates) are written as escapes; line feed and tab stay.
"""

import re

_ACTIVE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """``text`` with what is not for showing as ``\\x1b`` or ``\\u202e``."""
    return _ACTIVE.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # how Python reads a byte that is no UTF-8, in a path or an argument
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
