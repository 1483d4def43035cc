"""Sizes as people write them; what can only be a slip is asked about."""

import pytest

from quant.errors import UsageError
from quant.sizes import parse_size


@pytest.mark.parametrize("text", ["64", "1", "0.5", "24 ", "22.5", "1048575"])
def test_a_bare_number_that_is_no_memory_is_asked_about(text: str) -> None:
    with pytest.raises(UsageError, match=rf"was {text.strip()}GiB \(or MiB\) meant"):
        parse_size(text)


@pytest.mark.parametrize(
    "text", ["9" * 400, "9" * 400 + "GiB", "2000000TiB", "", "GiB", "-1GiB", "1.2.3GiB", "nan", "infGiB"]
)
def test_what_no_machine_has_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="bad size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "nbytes"), [("0", 0), ("1048576", 2**20), ("24GiB", 24 * 2**30), ("64B", 64), ("2.2 GiB", 2362232012)]
)
def test_what_can_be_meant_is_taken(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes
