"""Progress: what long work tells whoever asked, every now and then.

The library says how far it is and draws nothing; who calls it may draw a bar, or nothing.
"""

from collections.abc import Callable

# Parts done, parts in all, and what is being done: bytes of a file, layers of a model, tokens of a text.
Progress = Callable[[int, int, str], None]


def nobody(done: int, total: int, what: str) -> None:
    """Nobody asked."""
