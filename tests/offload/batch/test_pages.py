"""Pages are counted: each is given back once by each of its users, and used memory before new."""

import pytest

from offload.batch.pages import OutOfPages, PageCounts


def test_a_page_is_free_again_once_its_last_user_gave_it_back() -> None:
    counts = PageCounts(3)
    first, second = counts.take(), counts.take()
    counts.share(first)
    assert counts.shared(first) and not counts.shared(second)
    counts.give_back(first)
    assert counts.free == 1
    counts.give_back(first)
    assert counts.free == 2


def test_memory_that_was_used_is_taken_again_before_new() -> None:
    counts = PageCounts(100)
    taken = [counts.take() for _ in range(3)]
    counts.give_back(taken[1])
    assert counts.take() == taken[1] and counts.take() not in taken


def test_when_none_is_free_something_is_forgotten_or_it_is_an_error() -> None:
    counts = PageCounts(2)
    taken = [counts.take(), counts.take()]
    with pytest.raises(OutOfPages, match="all 2 pages of the KV cache are in use"):
        counts.take()

    def forget() -> bool:
        counts.give_back(taken.pop())
        return True

    counts.forget = forget
    assert counts.take() == 1 and len(taken) == 1


def test_pages_are_made_free_by_forgetting_no_more_than_it_takes() -> None:
    counts = PageCounts(4)
    taken = [counts.take() for _ in range(4)]

    def forget() -> bool:
        if taken:
            counts.give_back(taken.pop())
            return True
        return False

    assert counts.make_free(2, forget) and len(taken) == 2
    assert not counts.make_free(5, forget) and not taken
