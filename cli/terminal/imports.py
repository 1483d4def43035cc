"""Heavy imports, made a fifth quicker: with garbage looked for seldom meanwhile, and never in what they made.

torch and transformers make some hundred thousand objects that all stay. Python's collector would go through
them again and again while they come, and find next to nothing; and once in some hundred steps later, when a text that
is being written stands still for it: a fifth of a second, measured.
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


@contextmanager
def made_to_stay() -> Iterator[None]:
    """Garbage is not looked for any more among what there is at the end. Entered again, it is once more among what an
    earlier time has kept from it."""
    gc.unfreeze()
    yield
    gc.freeze()
