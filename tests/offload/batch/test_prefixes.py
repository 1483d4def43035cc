"""What sequences leave behind is found by its beginning, and forgotten by age."""

from offload.batch.prefixes import Prefix, Prefixes


def test_the_longest_common_beginning_is_found_first() -> None:
    freed: list[str] = []
    prefixes = Prefixes[str](freed.append)
    prefixes.keep([1, 2, 3, 4], "a")
    prefixes.keep([1, 2, 9], "b")
    prefixes.keep([7, 7], "c")
    found = prefixes.matching([1, 2, 3, 5, 6], [Prefix.of([1, 2, 3, 5], "live")])
    assert [(length, prefix.kept) for length, prefix in found] == [(4, "live"), (3, "a"), (2, "b")]
    assert not prefixes.take(found[0][1]) and prefixes.take(found[1][1])
    assert len(prefixes) == 2 and not freed, "whoever takes it has it now"


def test_what_was_used_longest_ago_is_forgotten_first() -> None:
    freed: list[str] = []
    prefixes = Prefixes[str](freed.append)
    for name in "abc":
        prefixes.keep([ord(name)], name)
    prefixes.use(prefixes.matching([ord("a")])[0][1])
    assert prefixes.forget() and freed == ["b"]
    prefixes.clear()
    assert freed == ["b", "c", "a"] and not prefixes.forget()


def test_they_are_no_more_than_can_be_searched() -> None:
    freed: list[int] = []
    prefixes = Prefixes[int](freed.append)
    for number in range(100):
        prefixes.keep([number], number)
    assert len(prefixes) == 64 and freed == list(range(36))
    prefixes.keep([], 1000)
    assert freed[-1] == 1000, "of nothing nothing is kept"
