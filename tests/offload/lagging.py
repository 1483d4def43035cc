"""A device whose work lags behind: the asynchronous double of the transfer seam.

Two queues, compute and copies, are worked off in order each and in random order between them, a random number
of steps at every call; with ``threaded``, by a thread that sleeps at random. A copy is done in several steps
and scrambles its target first, so whoever reads too early, or writes what is still being read, is found out.
"""

import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from offload.experts.storage.transfer import Transfer
from quant.errors import BudgetError, MachineError

_PARTS = 3


@dataclass(eq=False)
class Ticket:
    """Done once its queue has come to it."""

    done: bool = False


@dataclass
class _Work:
    do: Callable[[], None]
    needs: tuple[Ticket, ...] = ()
    ticket: Ticket = field(default_factory=Ticket)


class LaggingTransfer(Transfer):
    """``limit`` bytes of device memory; ``pinnable`` bytes of host memory can be pinned. While ``lazy``,
    nothing is done but what somebody waits for."""

    def __init__(
        self, seed: int = 0, *, limit: int = 2**40, pinnable: int = 2**40, threaded: bool = False, lazy: bool = False
    ) -> None:
        super().__init__()
        self.limit, self.pinnable, self.lazy = limit, pinnable, lazy
        self.allowed = 2**40  # bytes that this process may still take, if there are any
        self.hurries = False  # compute never lets a copy go first
        self.segments: list[tuple[int, int]] = []  # device memory: first and last address
        self.copies: list[tuple[int, int]] = []  # source and target address of each copy begun
        self._random = random.Random(seed)
        self._compute: deque[_Work] = deque()
        self._copying: deque[_Work] = deque()
        self._lock = threading.RLock()
        self._failed: BaseException | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if threaded:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()

    def allocate(self, slots: int, slot_bytes: int) -> Tensor:
        if slots * slot_bytes > self.limit:
            raise BudgetError(f"no {slots * slot_bytes} bytes are left")
        self.limit -= slots * slot_bytes
        memory = torch.full((slots, slot_bytes), 0xEE, dtype=torch.uint8)
        self.segments.append((memory.data_ptr(), memory.data_ptr() + memory.nbytes))
        return memory

    def copy(self, source: Tensor, target: Tensor, after: Ticket | None = None) -> Ticket:
        assert not self.on_device(source.data_ptr()), "an expert was written back"
        assert self.on_device(target.data_ptr())
        self.copies.append((source.data_ptr(), target.data_ptr()))
        needs = (after or self.mark(),)
        target = target[: source.numel()]
        self._put(self._copying, lambda: target.fill_(0xDD), needs)
        step = -(-source.numel() // _PARTS)
        for start in range(0, source.numel(), step):
            ticket = self._put(self._copying, _copy_part(source, target, start, start + step))
        return ticket

    def post(self, source: Tensor, target: Tensor) -> Ticket:
        return self._put(self._compute, lambda: target.copy_(source))

    def launch(self, kernel: Callable[[], None]) -> Ticket:
        """Queue ``kernel`` as compute."""
        return self._put(self._compute, kernel)

    def mark(self) -> Ticket:
        return self._put(self._compute, lambda: None)

    def landed(self, ticket: Ticket) -> None:
        self._put(self._compute, lambda: None, (ticket,))

    def poll(self, ticket: Ticket) -> bool:
        self._lag()
        return ticket.done

    def done(self, ticket: Ticket) -> None:
        while not ticket.done:
            self._advance()
        self._check()

    def drain(self) -> None:
        while self._compute or self._copying:
            self._advance()
        self._check()

    def memory_left(self) -> tuple[int, int]:
        return self.limit, self.allowed

    def register(self, address: int, nbytes: int) -> int:
        if nbytes > self.pinnable:
            raise MachineError("the double pins no more")
        self.pinnable -= nbytes
        return address

    def close(self) -> None:
        """Stop the thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def on_device(self, address: int) -> bool:
        """Whether ``address`` lies in device memory."""
        return any(start <= address < end for start, end in self.segments)

    def _put(self, queue: deque[_Work], do: Callable[[], object], needs: tuple[Ticket, ...] = ()) -> Ticket:
        work = _Work(lambda: void(do()), needs)
        with self._lock:
            queue.append(work)
        self._lag()
        return work.ticket

    def _lag(self) -> None:
        if self._thread is None and not self.lazy:
            for _ in range(self._random.choice((0, 0, 0, 1, 2, 7))):
                self._advance()

    def _advance(self) -> None:
        """One step of either queue; where a thread does the steps, leave it the time."""
        if self._thread is None:
            self._one_step()
        else:
            time.sleep(0)
            self._check()

    def _one_step(self) -> None:
        with self._lock:
            ready = [
                queue
                for queue in (self._compute, self._copying)
                if queue and all(needed.done for needed in queue[0].needs)
            ]
            assert ready or not (self._compute or self._copying), "the queues wait for one another"
            if not ready:
                return
            hurried = self.hurries and self._compute in ready
            work = (self._compute if hurried else self._random.choice(ready)).popleft()
            try:
                work.do()
            except BaseException as error:  # noqa: BLE001  # told to the thread that waits
                self._failed = error
            work.ticket.done = True
        if self._thread is None:
            self._check()

    def _check(self) -> None:
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed

    def _work(self) -> None:
        while not self._stop.is_set():
            self._one_step()
            if self._random.random() < 0.02:
                time.sleep(self._random.random() * 1e-3)


def _copy_part(source: Tensor, target: Tensor, start: int, end: int) -> Callable[[], object]:
    return lambda: target[start:end].copy_(source[start:end])


def void(result: object) -> None:
    """Drop ``result``."""
