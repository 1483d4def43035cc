"""Token ids, four bytes each: a Python list takes up to 36 for one, and a context may have ten million of them."""

from array import array
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt


def packed_ids(ids: Iterable[int]) -> "array[int]":
    """``ids``, each below 2^31, as an array that grows like a list, and is compared with arrays only."""
    return array("i", ids)


def frozen(ids: Iterable[int]) -> npt.NDArray[np.int32]:
    """A copy of ``ids`` that does not grow. A view of an array would keep that from growing."""
    return np.array(ids, dtype=np.int32)


def common(one: npt.NDArray[np.int32], other: npt.NDArray[np.int32]) -> int:
    """How many tokens both begin with."""
    count = min(len(one), len(other))
    different = np.flatnonzero(one[:count] != other[:count])
    return int(different[0]) if len(different) else count
