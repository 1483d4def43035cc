"""MappedFiles: experts used straight from the page cache until a copy of them is in the arena.

Where all experts fit in RAM and the page cache holds them already, a first token need not wait until they are
copied: memory that is new to the process must be cleared and, in a virtual machine, found by the host, which
takes several times as long as reading what is there. Mapped pages are small and slow to read for long, so
every expert is copied to the arena all the same, and used in the page cache until then.

A read lease (``fcntl(2)``) keeps others from opening the file for writing or cutting it until its last expert has
moved; where the system grants none, nothing is mapped. The system lets a writer wait for some time only (45 s, by
default): so each step ends with a look at whether the files changed under it, and pages that a file has lost meanwhile
read as zeros (``quant/kernels/cpp/guard.cpp``) where they would otherwise end the process.
"""

import fcntl
import mmap
import os
import signal
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offload.experts.storage.finite import check_scales
from offload.experts.storage.page_cache import PageCacheView
from offload.experts.storage.reader import Reader
from offload.experts.storage.store import ExpertRecord
from quant.checkpoint.checkpoint import DTYPES
from quant.checkpoint.layout import PAGE
from quant.checkpoint.weight_files import TensorEntry
from quant.errors import CheckpointError, MachineError
from quant.kernels.library import call

_POPULATE_READ = 22  # MADV_POPULATE_READ: map all pages of a range at once


class MappedFiles:
    """Maps experts of the files that ``reader`` reads. ``close`` gives the leases back."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._files: dict[Path, _Lease | None] = {}

    def map(self, record: ExpertRecord) -> Tensor | None:
        """The image of ``record``'s slot in the page cache, uint8; None if it is not all there in one piece,
        or its file cannot be leased. Raises NonFiniteError for scales that are no numbers."""
        if len(record.runs) != 1 or not record.runs[0].is_direct:
            return None
        run = record.runs[0]
        lease = self._lease(run.file)
        if lease is None or not lease.view.holds(run.offset, run.needed):
            return None
        try:
            self._reader.check(run.file)
        except CheckpointError:  # the read that follows says so
            return None
        image = lease.map(run.offset, run.needed)
        pages: Any = image.numpy()
        check_scales(record.scales, memoryview(pages))
        return image

    def tensor(self, entry: TensorEntry) -> Tensor | None:
        """A whole tensor in the page cache; None if it is not all there, or its file cannot be leased."""
        lease, start = self._lease(entry.file), entry.offset // PAGE * PAGE
        if lease is None or not lease.view.holds(start, entry.offset + entry.nbytes - start):
            return None
        dtype = DTYPES[entry.dtype]
        if entry.offset % dtype.itemsize:  # no element would lie where the CPU wants it
            return None
        self._reader.check(entry.file)
        return lease.map(entry.offset, entry.nbytes).view(dtype).view(entry.shape)

    def _lease(self, file: Path) -> "_Lease | None":
        if file not in self._files:
            self._files[file] = _Lease.of(file, self._reader)
        return self._files[file]

    def unmap(self, record: ExpertRecord) -> None:
        """The copy is there: the mapped pages need not count as this process's any more."""
        run = record.runs[0]
        lease = self._files.get(run.file)
        if lease is not None:
            lease.unmap(run.offset, run.needed)

    def check(self) -> None:
        """Raise CheckpointError if a file of which something was mapped has changed since it was opened."""
        for file, lease in self._files.items():
            if lease is not None:
                self._reader.check(file)

    def close(self) -> None:
        """Give all leases back; nothing that was mapped may be used afterwards."""
        for lease in self._files.values():
            if lease is not None:
                lease.close()
        self._files.clear()


class _Lease:
    """One file, mapped, that cannot be cut meanwhile."""

    def __init__(self, descriptor: int, view: PageCacheView) -> None:
        self._descriptor, self.view = descriptor, view
        self._map = mmap.mmap(descriptor, 0, mmap.MAP_SHARED, mmap.PROT_READ)
        with warnings.catch_warnings():  # that a tensor over these pages must not be written to: it never is
            warnings.simplefilter("ignore", UserWarning)
            self._memory = torch.frombuffer(self._map, dtype=torch.uint8)
        call("guard", self._memory, len(self._map))

    @classmethod
    def of(cls, file: Path, reader: Reader) -> "_Lease | None":
        """A lease on the file that ``reader`` reads as ``file``; None if that was replaced, or the system knows
        no leases or does not grant it."""
        if not hasattr(fcntl, "F_SETLEASE"):
            return None
        try:
            descriptor = os.open(file, os.O_RDONLY)
        except OSError:
            return None
        try:
            if not reader.is_same(file, descriptor):
                os.close(descriptor)
                return None
            # A writer waits, and this process gets a signal that is ignored by default.
            fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
            fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            return cls(descriptor, PageCacheView(file, descriptor))
        except (OSError, ValueError, MachineError):
            os.close(descriptor)
            return None

    def map(self, offset: int, length: int) -> Tensor:
        self._advise(_POPULATE_READ, offset, length)
        return self._memory[offset : offset + length]

    def unmap(self, offset: int, length: int) -> None:
        self._advise(mmap.MADV_DONTNEED, offset, length)

    def _advise(self, advice: int, offset: int, length: int) -> None:
        try:
            self._map.madvise(advice, offset, length)
        except OSError:
            return  # older kernels: pages are mapped one by one as they are used

    def close(self) -> None:
        call("unguard", self._memory)
        # Closing alone would not end it: the mappings have descriptors of their own.
        with suppress(BlockingIOError):  # the system took it: a writer waited for as long as one has to
            fcntl.fcntl(self._descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        os.close(self._descriptor)
