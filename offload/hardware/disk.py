"""How fast a filesystem gives large files: several sequential reads in flight, past the page cache.

The same pattern as the expert reader's: a few threads, pieces of 4 MiB, page-aligned buffers, O_DIRECT.
"""

import ctypes
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from quant.errors import MachineError

PIECE = 4 * 2**20
THREADS = 4
_LARGE = 256 * 2**20  # smaller files say more about caches than about the disk
_WRITTEN = 256 * 2**20
_WRITE_SECONDS = 0.8
_WINDOW_SECONDS = 0.3
_WINDOWS = 3
_HUGE = 2 * 2**20
_BUFFERS = 48  # more than a processor's cache holds, as the slots of experts are


@dataclass(frozen=True)
class DiskRate:
    """GB/s (10^9 bytes) of sequential reads, and what has to be said about how it was measured."""

    gb_s: float
    notes: tuple[str, ...]


def disk_rate(directory: Path) -> DiskRate:
    """Measure the filesystem of ``directory`` on its largest file if that has 256 MiB, else on a temporary
    one.

    Reads different bytes for about a second; the median of three windows counts. Raises MachineError if the
    directory can be neither read nor written.
    """
    notes: tuple[str, ...] = ()
    try:
        file = _largest(directory)
        if file is not None:
            return _measure(file)
        if not os.access(directory, os.W_OK):
            notes = (f"{directory} cannot be written: the disk was measured where {tempfile.gettempdir()} is",)
            directory = Path(tempfile.gettempdir())
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".coldstream-probe-") as made:
            _write(made.fileno())
            rate = _measure(Path(made.name))
    except OSError as error:
        raise MachineError(f"the disk of {directory} cannot be measured: {error.strerror}") from None
    return DiskRate(rate.gb_s, notes + rate.notes)


def _largest(directory: Path) -> Path | None:
    sizes = [(file.stat().st_size, file) for file in directory.iterdir() if file.is_file() and os.access(file, os.R_OK)]
    size, file = max(sizes, default=(0, directory))
    return file if size >= _LARGE else None


def _write(descriptor: int) -> None:
    """Fill a file with bytes that do not compress, as many as a slow disk takes in the time, and drop its
    pages.
    """
    block = os.urandom(PIECE)
    started = time.perf_counter()
    for done in range(0, _WRITTEN, PIECE):
        os.pwrite(descriptor, block, done)
        if done % (8 * PIECE) == 0:
            os.fsync(descriptor)
            if time.perf_counter() - started > _WRITE_SECONDS and done >= 8 * PIECE:
                break
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _measure(file: Path) -> DiskRate:
    descriptor, notes = _open(file)
    try:
        pieces = os.fstat(descriptor).st_size // PIECE
        if not pieces:
            raise MachineError(f"{file} is too short to measure a disk with: expected {PIECE:,} bytes or more")
        buffers = _buffers()
        # Never the same bytes twice while there are others: a drive and a host have caches of their own.
        order, rates, windows = count(), [], min(_WINDOWS, max(1, pieces // (4 * THREADS)))
        for window in range(windows):
            last = pieces * (window + 1) // windows
            rates.append(_window(descriptor, buffers, order, last))
        return DiskRate(statistics.median(rates), notes)
    finally:
        os.close(descriptor)


def _buffers() -> list[memoryview]:
    """What is read into, in turn, in huge pages where the system grants them, as the arena's slots are.

    It matters: direct reads into scattered small pages reached a third of the rate on a virtual NVMe disk.
    """
    memory = mmap.mmap(-1, _BUFFERS * PIECE + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % _HUGE
    whole = memoryview(memory)
    buffers = [whole[start + index * PIECE : start + (index + 1) * PIECE] for index in range(_BUFFERS)]
    for buffer in buffers:
        buffer[:] = bytes(PIECE)  # resident before the clock starts
    return buffers


def _window(descriptor: int, buffers: Sequence[memoryview], order: "count[int]", last: int) -> float:
    """GB/s of one short run that reads pieces in ``order`` up to piece ``last``. Raises OSError, and RuntimeError where
    threads cannot be started, once those that read are done."""
    started = time.perf_counter()
    deadline = started + _WINDOW_SECONDS

    def read(_: int) -> int:
        done = 0
        while time.perf_counter() < deadline:
            piece = next(order)  # atomic: one bytecode of C code
            if piece >= last:
                break
            done += os.preadv(descriptor, [buffers[piece % len(buffers)]], piece * PIECE)
        return done

    with ThreadPoolExecutor(THREADS, "disk") as pool:
        done = sum(pool.map(read, range(THREADS)))
    return done / (time.perf_counter() - started) / 1e9


def _open(file: Path) -> tuple[int, tuple[str, ...]]:
    try:
        return os.open(file, os.O_RDONLY | os.O_DIRECT), ()
    except OSError:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        return descriptor, (
            f"direct I/O is refused where {file.parent} lies: the disk was measured through the page cache",
        )
