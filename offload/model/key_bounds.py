"""KeyBounds: what keys of each page there can be, by which a decode step leaves out pages that cannot matter.

Of each full page of a layer that attends to everything, and of each KV head, the smallest and the largest key of every
channel stay in memory, wherever the page is. The greatest score that a query can have with any key between them bounds
the page's share of the softmax; pages whose shares cannot come to more than ``epsilon`` altogether are not read, nor
brought from disk. An output is then off by no more than 2 · epsilon · the largest value.

Legend: P pages, h KV heads, w channels of a head up to a multiple of 16.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from offload.records import LeftOut
from quant.kernels.attention import KvPages
from quant.kernels.library import F64, I64, Pointer, call, fields

_Elsewhere = ctypes.CFUNCTYPE(I64, Pointer, I64, ctypes.POINTER(Pointer))
_Need = ctypes.CFUNCTYPE(None, Pointer, ctypes.POINTER(I64), I64)


class _CKeyBounds(ctypes.Structure):
    """``coldstream::KeyBounds`` of kernels.h."""

    _fields_ = fields(
        (Pointer, "ranges known"),
        (F64, "epsilon"),
        (_Elsewhere, "elsewhere"),
        (_Need, "need"),
        (I64, "seen left_out"),
        (F64, "share"),
    )


class KeyBounds:
    """The bounds of ``pages``, for native calls, which find them when they first ask for a page that is full."""

    def __init__(self, epsilon: float, pages: KvPages) -> None:
        count, heads, _, width = pages.keys.shape
        self.epsilon, self._pages, self._heads, self._width = epsilon, pages, heads, width
        self._ranges = torch.empty(count, heads, 2, range_width(width), dtype=torch.bfloat16)
        known = torch.zeros(count, dtype=torch.uint8)
        self._known, self._held = known.numpy(), known
        self._native = _CKeyBounds(self._ranges.data_ptr(), known.data_ptr(), epsilon)
        pages.native.bounds = ctypes.addressof(self._native)
        scale = 0 if pages.key_scale is None else 4
        self._page_nbytes = 2 * pages.keys.shape[2] * (width * pages.keys.itemsize + scale)
        self._told = 0, 0

    def elsewhere_by(self, elsewhere: Callable[[int, int, Any], int], need: Callable[[int, Any, int], None]) -> None:
        """Have native calls ask for the ranges of pages on disk, and say which they are going to ask for: see
        kernels.h."""
        self._native.elsewhere, self._native.need = _Elsewhere(elsewhere), _Need(need)

    def forget(self, page: int) -> None:
        """``page`` is written to."""
        self._known[page] = 0

    def of(self, pages: Sequence[int]) -> Tensor:
        """The ranges bf16 ``[P, h, 2, w]`` of full ``pages``: of each channel the smallest and the largest key."""
        unknown = torch.tensor([page for page in pages if not self._known[page]], dtype=torch.int32)
        call("find_key_ranges", self._pages.native, self._heads, self._width, unknown, len(unknown))
        return self._ranges[list(pages)]

    def take_left_out_nbytes(self) -> int:
        """Bytes of keys and values that were not read since the last call, less those of the bounds that were."""
        native, (seen, left_out) = self._native, self._told
        self._told = int(native.seen), int(native.left_out)
        ranges = 4 * range_width(self._width)
        return (self._told[1] - left_out) * self._page_nbytes - (self._told[0] - seen) * ranges

    @property
    def left_out(self) -> LeftOut:
        """What has been left out so far."""
        native = self._native
        return LeftOut(
            self.epsilon, native.seen, native.left_out, native.left_out * self._page_nbytes, float(native.share)
        )


def range_width(head_dim: int) -> int:
    """Channels that a range has room for."""
    return -(-head_dim // 16) * 16
