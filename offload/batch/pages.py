"""PageCounts: which pages of a KV cache are free, and how many sequences look at each of the others."""

from collections.abc import Callable

from quant.errors import BudgetError


class OutOfPages(BudgetError):
    """No page of the KV cache is free, and none can be had by forgetting what nobody uses."""


def _nothing_to_forget() -> bool:
    return False


def _nobody_asks(page: int) -> None:
    return None


class PageCounts:
    """``count`` pages, all free at first. One that was given back is taken again before one that never was used: memory
    that no token has reached costs nothing.

    ``forget`` is asked for pages when none is free: it gives some back, and says whether it did.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.forget: Callable[[], bool] = _nothing_to_forget
        self.taken: Callable[[int], None] = _nobody_asks  # told of each page that is taken
        self.given_back = 0  # how often a page became free
        self.reached = 0  # pages that were ever in use
        self._users = [0] * count
        self._free = list(range(count - 1, -1, -1))

    @property
    def free(self) -> int:
        """Pages that nobody uses."""
        return len(self._free)

    def take(self) -> int:
        """A free page, now in use once. Raises OutOfPages if there is none."""
        while not self._free:
            if not self.forget():
                raise OutOfPages(f"all {self.count:,} pages of the KV cache are in use: give it more with --context")
        page = self._free.pop()
        self.reached = max(self.reached, page + 1)
        self._users[page] = 1
        self.taken(page)
        return page

    def make_free(self, count: int, forget: Callable[[], bool]) -> bool:
        """Have ``forget`` give pages back until ``count`` are free; whether they are."""
        while len(self._free) < count:
            if not forget():
                return False
        return True

    def share(self, page: int) -> None:
        """One more sequence uses ``page``."""
        assert self._users[page] > 0, "a free page has nothing to share"
        self._users[page] += 1

    def shared(self, page: int) -> bool:
        """Whether more than one sequence uses ``page``: then nobody writes to it."""
        return self._users[page] > 1

    def give_back(self, page: int) -> None:
        """One sequence less uses ``page``."""
        assert self._users[page] > 0, "a page is given back once by each of its users"
        self._users[page] -= 1
        if not self._users[page]:
            self._free.append(page)
            self.given_back += 1
