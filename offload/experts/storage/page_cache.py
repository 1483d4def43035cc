"""What the operating system's page cache already holds of a file.

Asked before a direct read: pages that are in memory anyway are copied, not read from disk again.
``RWF_NOWAIT`` would answer by trying, but a miss starts a readahead, which fills the cache behind our back;
``mincore`` only looks.
"""

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np
from torch import Tensor

from quant.checkpoint.layout import PAGE


def forget_pages(tensor: Tensor) -> None:
    """Let the pages that ``tensor``, never to be read again, fills as a whole no longer count as resident."""
    first = -(-tensor.data_ptr() // PAGE) * PAGE
    length = (tensor.data_ptr() + tensor.nbytes) // PAGE * PAGE - first
    if length > 0 and tensor.device.type == "cpu":
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


class PageCacheView:
    """Looks at one open file's pages in the page cache, mapping it without touching it.

    The kernel answers only the file's owner or who may write it; for anyone else nothing counts as cached.
    """

    def __init__(self, file: Path, descriptor: int) -> None:
        size = os.fstat(descriptor).st_size
        allowed = os.fstat(descriptor).st_uid == os.geteuid() or os.access(file, os.W_OK)
        self._map = mmap.mmap(descriptor, size, mmap.MAP_SHARED, mmap.PROT_READ) if allowed and size else None
        self._size = size
        self._address = np.frombuffer(self._map, np.uint8).ctypes.data if self._map is not None else 0
        self._mincore = ctypes.CDLL(None, use_errno=True).mincore
        self._mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)

    def holds(self, offset: int, length: int) -> bool:
        """Whether all pages of ``length`` bytes at ``offset`` (a multiple of the page size) are in memory."""
        length = min(length, self._size - offset)
        if self._map is None or length <= 0:
            return False
        vector = np.empty(-(-length // PAGE), np.uint8)
        if self._mincore(self._address + offset, length, vector.ctypes.data) != 0:
            return False
        return bool((vector & 1).all())
