"""Checksums of memory, as fast as it can be read: XXH64, which tells what was spoiled by chance, not by intent."""

import ctypes
from collections.abc import Sequence

from quant.kernels.library import I64, call


def checksums(pieces: Sequence[memoryview]) -> list[int]:
    """XXH64 (seed 0) of each of ``pieces``, contiguous and writable. The interpreter is free meanwhile."""
    count = len(pieces)
    starts = (ctypes.c_void_p * count)(*(ctypes.addressof(ctypes.c_char.from_buffer(piece)) for piece in pieces))
    sums = (ctypes.c_uint64 * count)()
    call("checksums", starts, (ctypes.c_int64 * count)(*(piece.nbytes for piece in pieces)), I64(count), sums)
    return list(sums)
