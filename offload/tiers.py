"""Tiers, the keys of experts, and what people call the roles of bytes in memory."""

from typing import Literal

from quant.model.families import ROLE_NAMES

Tier = Literal["vram", "ram", "disk"]
TIERS: tuple[Tier, ...] = ("vram", "ram", "disk")
Key = tuple[int, int]  # an expert: (layer, expert)

_NAMES = {
    **ROLE_NAMES,
    "experts_hot": "routed experts, hot",
    "experts_warm": "routed experts, warm",
    "experts_cold": "routed experts, cold",
    "kv": "KV cache",
    "kv_cache": "KV cache",
    "free_slots": "free expert slots",
    "padding": "slot padding",
    "framework": "Python and its libraries",
    "process": "Python and its libraries",
}


def role_name(role: str) -> str:
    """A ledger's, a plan's or a checkpoint's role as a reader calls it."""
    return _NAMES.get(role) or role.replace("_", " ")
