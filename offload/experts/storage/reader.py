"""Reader: expert records from disk into slots, several in flight, the urgent ones first.

Requests wait in a heap ordered by priority; threads take the most urgent. A demand that finds its expert
already waiting as a prefetch or a fill raises that request's priority, so a guess never delays what is needed
now. A record is read in pieces by several threads, because one large read does not keep a fast disk busy.
"""

import heapq
import itertools
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

from offload.experts.storage.finite import ScalePlace, check_scales
from offload.experts.storage.page_cache import PageCacheView
from offload.experts.storage.store import ByteRange, ExpertRecord
from offload.hardware.disk import PIECE
from quant.checkpoint.file_states import FileStates
from quant.checkpoint.layout import PAGE
from quant.errors import CheckpointError, NonFiniteError


class Priority(IntEnum):
    """How urgent a read is: needed now, expected soon, expected by the next token, or filling memory that is
    free."""

    DEMAND = 0
    PREFETCH = 1
    NEXT = 2
    FILL = 3


@dataclass
class ReadRequest:
    """One record on its way into a buffer. ``wait`` returns when all of it is there, or raises what went
    wrong."""

    pieces: list[tuple[ByteRange, int, int]]  # run, start and end within it
    buffer: memoryview
    priority: Priority
    nbytes: int
    scales: Sequence[ScalePlace] = ()  # to be looked at once they are there
    then: Callable[[bool], None] | None = None
    remaining: int = 0
    next_piece: int = 0
    done: threading.Event = field(default_factory=threading.Event)
    error: CheckpointError | None = None

    def wait(self) -> None:
        """Block until the record is whole. Raises CheckpointError if the disk did not give it."""
        self.done.wait()
        if self.error is not None:
            raise self.error


class Reader:
    """A pool of reading threads. ``direct`` bypasses the page cache; with ``page_cached``, pages that are in it
    already are copied from there, which makes a second start as quick as memory. A run that keeps reading
    goes without: its speed must not depend on memory beyond its budget.

    Each file is opened once: one that is replaced meanwhile goes on being read as it was. Raises CheckpointError
    for one that cannot be opened, or is no longer in its state of ``states``, in which its header was read.
    """

    def __init__(
        self,
        files: Sequence[Path],
        states: FileStates | None = None,
        *,
        threads: int = 4,
        direct: bool = True,
        page_cached: bool = False,
    ) -> None:
        self.notes: list[str] = []
        self.direct, self.page_cached = direct, page_cached
        self._plain: dict[Path, int] = {}
        self._direct: dict[Path, int] = {}
        self._views: dict[Path, PageCacheView] = {}
        self._stamp: dict[Path, tuple[int, int]] = {}
        self._finite: set[tuple[Path, int]] = set()  # where the records begin whose scales were found to be numbers
        self._heap: list[tuple[int, int, int, ReadRequest]] = []
        self._order = itertools.count()
        self._ready = threading.Condition()
        self._closed = False
        for file in sorted(set(files)):
            self._open(file, states)
        self._threads: list[threading.Thread] = []
        try:
            for number in range(threads):
                thread = threading.Thread(target=self._work, name=f"reader-{number}", daemon=True)
                thread.start()
                self._threads.append(thread)
        except RuntimeError:  # the system starts no more of them
            self.close()
            raise

    def _open(self, file: Path, states: FileStates | None) -> None:
        try:
            self._plain[file] = os.open(file, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{file} cannot be opened: {error.strerror}") from None
        self._stamp[file] = self._state(file)
        if states is not None:
            states.check_open(file, self._plain[file])
        if not self.direct:
            return
        try:
            # The same file, whatever has its name by now.
            self._direct[file] = os.open(f"/proc/self/fd/{self._plain[file]}", os.O_RDONLY | os.O_DIRECT)
            self._views[file] = PageCacheView(file, self._plain[file])
        except OSError:
            self.direct = False
            self.notes.append(
                f"direct I/O is not available where {file.parent} lies: experts are read through the page "
                "cache, which takes memory beyond --ram"
            )

    def submit(
        self,
        record: ExpertRecord,
        buffer: memoryview,
        priority: Priority,
        order: int = 0,
        then: Callable[[bool], None] | None = None,
    ) -> ReadRequest:
        """Start reading ``record`` into ``buffer`` (page-aligned, ``record.slot_bytes`` long); among requests
        of the same priority the lower ``order`` goes first, then the older. A reading thread calls ``then``
        when all is there or has failed, unless the request is cancelled."""
        pieces = [
            (run, start, min(start + PIECE, run.length)) for run in record.runs for start in range(0, run.length, PIECE)
        ]
        first = (record.runs[0].file, record.runs[0].offset)
        scales = () if first in self._finite else record.scales
        request = ReadRequest(pieces, buffer, priority, record.nbytes, scales, then, remaining=len(pieces))
        with self._ready:
            heapq.heappush(self._heap, (priority, order, next(self._order), request))
            self._ready.notify_all()
        return request

    def promote(self, request: ReadRequest, priority: Priority) -> None:
        """Make a waiting request at least as urgent as ``priority``."""
        with self._ready:
            if priority < request.priority:
                request.priority = priority
                # The old heap entry stays behind and is skipped: by then all pieces are taken.
                heapq.heappush(self._heap, (priority, 0, next(self._order), request))
                self._ready.notify_all()

    def cancel(self, request: ReadRequest) -> bool:
        """Drop a request that has not begun; False if it has."""
        with self._ready:
            if request.next_piece:  # it has begun
                return False
            request.next_piece = len(request.pieces)
            request.error = CheckpointError("the read was cancelled")
            request.done.set()
            return True

    def close(self) -> None:
        """Stop the threads and close the files. Requests that have not begun never will."""
        with self._ready:
            self._closed = True
            self._heap.clear()
            self._ready.notify_all()
        for thread in self._threads:
            thread.join()
        for descriptor in itertools.chain(self._plain.values(), self._direct.values()):
            os.close(descriptor)
        self._plain.clear()
        self._direct.clear()

    def check(self, file: Path) -> None:
        """Raise CheckpointError if ``file`` was written to since it was opened."""
        if self._state(file) != self._stamp[file]:
            raise CheckpointError(f"{file} was changed while the model ran: start again once it is whole")

    def is_same(self, file: Path, descriptor: int) -> bool:
        """Whether ``descriptor`` is of the file that this reads as ``file``."""
        return os.path.sameopenfile(descriptor, self._plain[file])

    def _state(self, file: Path) -> tuple[int, int]:
        """What changes when a file is written to: its size and time of change. Asked of the open file, so one
        that is replaced as a whole does no harm."""
        found = os.fstat(self._plain[file])
        return found.st_size, found.st_mtime_ns

    def _work(self) -> None:
        while (taken := self._take()) is not None:
            request, (run, start, end) = taken
            error: CheckpointError | None = None
            try:
                self._read(run, start, request.buffer[run.position + start : run.position + end])
            except OSError as cause:
                error = CheckpointError(f"{run.file} cannot be read at byte {run.offset + start:,}: {cause.strerror}")
            except CheckpointError as cause:
                error = cause
            with self._ready:
                request.error = request.error or error
                request.remaining -= 1
                last = request.remaining == 0
            if last:
                self._finish(request)

    def _finish(self, request: ReadRequest) -> None:
        """All that was asked for has been read, or could not be."""
        if request.error is None and request.scales:
            try:
                check_scales(request.scales, request.buffer)
                self._finite.add((request.pieces[0][0].file, request.pieces[0][0].offset))
            except NonFiniteError as error:
                request.error = error
        with self._ready:
            if request.then is not None:
                request.then(request.error is None)
            request.done.set()

    def _take(self) -> tuple[ReadRequest, tuple[ByteRange, int, int]] | None:
        with self._ready:
            while not self._closed:
                while self._heap and self._heap[0][3].next_piece >= len(self._heap[0][3].pieces):
                    heapq.heappop(self._heap)
                if self._heap:
                    request = self._heap[0][3]
                    request.next_piece += 1
                    return request, request.pieces[request.next_piece - 1]
                self._ready.wait()
        return None

    def _read(self, run: ByteRange, start: int, buffer: memoryview) -> None:
        offset, done, wanted = run.offset + start, 0, min(len(buffer), run.needed - start)
        self.check(run.file)
        direct = self.direct and run.is_direct
        if direct and self.page_cached:
            direct = not self._views[run.file].holds(offset, wanted)
        descriptor = (self._direct if direct else self._plain)[run.file]
        while done < wanted:
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
            if count == 0:
                raise CheckpointError(f"{run.file} ends at byte {offset + done:,}: it shrank while it was read")
            # A direct read that stopped inside a page goes on from the page's start, to stay aligned.
            done += count if not direct or done + count >= wanted else count // PAGE * PAGE
            if count < PAGE and direct and done < wanted:
                raise CheckpointError(f"{run.file} gave {count} bytes at byte {offset + done:,}: a short disk read")
        self.check(run.file)
