"""Heavy imports, made a fifth quicker: without looking for garbage meanwhile.

torch and transformers make some hundred thousand objects that all stay. Python's collector would go through
them again and again while they come, and find nothing.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collecting() -> Iterator[None]:
    """No garbage collection inside."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
