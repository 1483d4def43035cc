"""The one seam for copies between host slots and a device.

Two queues of work run on a device, each in order and beside one another: compute, and copies. A ticket marks
a point in one of them; the other can wait for it, and so can the host. ``Transfer`` itself does all at once, on a
"device" that is host memory: with it, every split of experts over tiers runs without a GPU. ``CudaTransfer``
copies on a stream of its own from pinned memory; compute is queued on the stream that is current in the calling
thread.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from offload.hardware import cuda_driver as driver
from quant.errors import BudgetError
from quant.sizes import format_size


class Transfer:
    """Copies slots to ``device`` and says when one may be used; here at once, in host memory."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")

    def allocate(self, slots: int, slot_bytes: int) -> Tensor:
        """Device memory for ``slots`` slots, uint8 ``[slots, slot_bytes]``. Raises BudgetError if there is
        none."""
        return torch.empty(slots, slot_bytes, dtype=torch.uint8)

    def table(self, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """A small table ``[rows, columns]`` of zeros on the device, and two of host memory to post it
        from."""
        pinned = self.device.type == "cuda"
        first, second = (torch.zeros(rows, columns, dtype=dtype, pin_memory=pinned) for _ in range(2))
        return torch.zeros(rows, columns, dtype=dtype, device=self.device), first, second

    def copy(self, source: Tensor, target: Tensor, after: Any = None) -> Any:
        """Begin copying host ``source`` to device ``target``, after the compute that ``after`` marks, by
        default all that is queued; the ticket says when it has landed."""
        target[: source.numel()].copy_(source)

    def post(self, source: Tensor, target: Tensor) -> Any:
        """Copy host ``source`` to device ``target`` in the compute queue; the ticket says when that is
        done."""
        target.copy_(source, non_blocking=True)
        return self.mark()

    def send(self, values: npt.NDArray[np.integer[Any]]) -> Tensor:
        """``values`` on the device, copied there in the compute queue."""
        return torch.from_numpy(values)

    def mark(self) -> Any:
        """A ticket for all compute queued so far."""

    def landed(self, ticket: Any) -> None:
        """Make compute queued from now on wait for ``ticket``."""

    def poll(self, ticket: Any) -> bool:
        """Whether ``ticket``'s work is done, without waiting."""
        return True

    def done(self, ticket: Any) -> None:
        """Wait on the host until ``ticket``'s work is done."""

    def drain(self) -> None:
        """Wait on the host until nothing is queued."""

    def reclaim(self) -> None:
        """Hand device memory that nothing refers to back to the driver."""

    def memory_left(self) -> tuple[int, int]:
        """(bytes of device memory that no process has, bytes that this one may still take). Asks the driver,
        waits for nothing."""
        return 0, 0

    def register(self, address: int, nbytes: int) -> int:
        """Pin host memory, so that copies from it do not wait and the device can read it in place; returns
        the address by which the device does. Raises MachineError if that is refused."""
        return address

    def unregister(self, address: int) -> None:
        """Undo ``register`` at the same host address."""


class CudaTransfer(Transfer):
    """Copies on a side stream; tickets are events."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._stream = torch.cuda.Stream(device)

    def allocate(self, slots: int, slot_bytes: int) -> Tensor:
        try:
            return torch.empty(slots, slot_bytes, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError:
            raise BudgetError(
                f"the GPU has no {format_size(slots * slot_bytes)} free for expert slots: lower --vram, or "
                "end what else runs on it"
            ) from None

    def copy(self, source: Tensor, target: Tensor, after: torch.cuda.Event | None = None) -> torch.cuda.Event:
        if after is None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        else:
            self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            target[: source.numel()].copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        return event

    def send(self, values: npt.NDArray[np.integer[Any]]) -> Tensor:
        # torch's allocator of pinned memory keeps the block until the copy has been made.
        return torch.from_numpy(values).pin_memory().to(self.device, non_blocking=True)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def landed(self, ticket: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(ticket)

    def poll(self, ticket: torch.cuda.Event) -> bool:
        return bool(ticket.query())

    def done(self, ticket: torch.cuda.Event) -> None:
        ticket.synchronize()

    def drain(self) -> None:
        torch.cuda.synchronize(self.device)

    def reclaim(self) -> None:
        torch.cuda.empty_cache()

    def memory_left(self) -> tuple[int, int]:
        index = self._stream.device_index
        free, total = torch.cuda.mem_get_info(index)
        limit = int(torch.cuda.get_per_process_memory_fraction(index) * total)
        return free, limit - torch.cuda.memory_reserved(index)

    def register(self, address: int, nbytes: int) -> int:
        return driver.pin(address, nbytes)

    def unregister(self, address: int) -> None:
        driver.unpin(address)
