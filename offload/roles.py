"""What people call the roles of bytes in memory: a checkpoint's own, and those that a run adds."""

from quant.families import ROLE_NAMES

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
