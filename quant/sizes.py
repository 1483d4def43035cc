"""Byte sizes as people write them: ``24GiB``, ``2.2 GiB``, ``500MB``."""

import re

from quant.errors import UsageError

KV_PAGE_TOKENS = 128  # tokens of one page of the KV cache: what attention looks at in one block

_UNITS = {
    "": 1,
    "b": 1,
    "k": 2**10,
    "kib": 2**10,
    "kb": 10**3,
    "m": 2**20,
    "mib": 2**20,
    "mb": 10**6,
    "g": 2**30,
    "gib": 2**30,
    "gb": 10**9,
    "t": 2**40,
    "tib": 2**40,
    "tb": 10**12,
}
_MOST = 2**60
_LEAST_BARE = 2**20  # nothing here is smaller, and whoever counts in bytes writes more digits
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*$")


def parse_size(text: str) -> int:
    """Bytes of ``text``; GiB, MiB … are powers of two, GB, MB … powers of ten.

    Raises UsageError for what is no size, and for a number without a unit that can only be meant otherwise.
    """
    match = _SIZE.match(text)
    if match is None or match[2].lower() not in _UNITS:
        raise UsageError(f"bad size {text!r}: expected a number and a unit, for example 24GiB or 500MB")
    if not match[2] and 0 < float(match[1]) < _LEAST_BARE:
        raise UsageError(f"{text.strip()} is {text.strip()} bytes: was {text.strip()}GiB (or MiB) meant? give the unit")
    nbytes = float(match[1]) * _UNITS[match[2].lower()]
    if nbytes > _MOST:
        raise UsageError(f"bad size {text[:40]!r}: expected at most {_MOST >> 40:,}TiB")
    return int(nbytes)


def as_bytes(size: int | str) -> int:
    """``size`` in bytes, or as people write it. Raises UsageError."""
    return parse_size(size) if isinstance(size, str) else size


def format_size(count: float) -> str:
    """``count`` bytes in the largest binary unit that keeps it at or above one: ``1.50 GiB``."""
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if abs(count) >= 2**power:
            return f"{count / 2**power:.2f} {unit}"
    return f"{int(count)} B"
