"""Scales that are no numbers, found as they are read: a NaN in one makes a whole group of weights NaN, and all text
after it nonsense."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quant.errors import NonFiniteError

# A float is NaN or infinite where all bits of its exponent are set.
_EXPONENTS: dict[str, tuple[type[np.unsignedinteger], int]] = {
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
    "F32": (np.uint32, 0x7F80_0000),
    "F64": (np.uint64, 0x7FF0_0000_0000_0000),
}
_AT_ONCE = 2**16  # values: what they are compared in stays in a core's cache


@dataclass(frozen=True)
class ScalePlace:
    """Where in a slot the scales called ``key`` lie: ``nbytes`` from ``position``, values of ``dtype``."""

    key: str
    position: int
    nbytes: int
    dtype: str


def check_scales(scales: Sequence[ScalePlace], slot: memoryview) -> None:
    """Raise NonFiniteError, naming the tensor, if any of ``scales`` in ``slot`` holds NaN or Inf."""
    for place in scales:
        if not is_finite(slot[place.position : place.position + place.nbytes], place.dtype):
            raise NonFiniteError(
                f"tensor {place.key} holds NaN or infinite scales: expected numbers; download its file again, or "
                "quantize the original anew"
            )


def is_finite(values: memoryview, dtype: str) -> bool:
    """Whether none of ``values``, floats of ``dtype``, is NaN or infinite."""
    kind, exponent = _EXPONENTS[dtype]
    bits, mask = np.frombuffer(values, kind), kind(exponent)
    blocks = (bits[start : start + _AT_ONCE] for start in range(0, len(bits), _AT_ONCE))
    return not any(((block & mask) == mask).any() for block in blocks)
