"""Python's collector goes through what a run has loaded once, not again and again."""

import gc
import time
import weakref

import pytest

from cli.terminal.imports import made_to_stay


class _Ring:
    """Garbage as soon as nobody else knows it."""

    def __init__(self) -> None:
        self.itself = self


def test_what_was_made_to_stay_is_looked_at_again_by_the_next_who_makes_something_to_stay() -> None:
    with made_to_stay():
        ring = _Ring()
    found = weakref.ref(ring)
    del ring
    gc.collect()
    assert found() is not None
    with made_to_stay():
        gc.collect()
        assert found() is None
    gc.unfreeze()


def test_a_collection_takes_no_time_for_what_stays() -> None:
    def seconds() -> float:
        started = time.perf_counter()
        gc.collect()
        return time.perf_counter() - started

    try:
        kept = [[number] for number in range(300_000)]
        before = min(seconds() for _ in range(3))
        with made_to_stay():
            pass
        assert min(seconds() for _ in range(3)) < before / 2
        assert len(kept) == 300_000
    finally:
        gc.unfreeze()


def test_a_load_that_fails_is_garbage_like_anything_else() -> None:
    with pytest.raises(ValueError, match="disk"), made_to_stay():
        raise ValueError("disk")
    assert gc.get_freeze_count() == 0
