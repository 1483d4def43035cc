"""The one seam for copies between host slots and the device.

``HostTransfer`` is the synchronous implementation: the "device" is host memory. Tests use it for every split
of experts over tiers, and a machine without a GPU for none. ``CudaTransfer`` copies on a stream of its own
from pinned memory; compute waits on the event of the copy it needs, never on the stream.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from quant.errors import BudgetError
from quant.sizes import format_size


class Transfer(Protocol):
    """Copies slots to the device and says when one may be used."""

    device: torch.device

    def allocate(self, slots: int, slot_bytes: int) -> Tensor:
        """Device memory for ``slots`` slots, uint8 ``[slots, slot_bytes]``. Raises BudgetError if there is
        none."""

    def copy(self, source: Tensor, target: Tensor) -> Any:
        """Begin copying host ``source`` to device ``target``; the ticket says when it has landed."""

    def landed(self, ticket: Any) -> None:
        """Make the compute stream wait for ``ticket``'s copy."""

    def done(self, ticket: Any) -> None:
        """Wait on the host until ``ticket``'s copy no longer reads its source."""


class HostTransfer:
    """Copies at once, in host memory."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def allocate(self, slots: int, slot_bytes: int) -> Tensor:
        return torch.empty(slots, slot_bytes, dtype=torch.uint8)

    def copy(self, source: Tensor, target: Tensor) -> None:
        target[: source.numel()].copy_(source)

    def landed(self, ticket: None) -> None:
        return

    def done(self, ticket: None) -> None:
        return


class CudaTransfer:
    """Copies on a side stream. A slot is written only after the compute queued so far has finished with
    it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def allocate(self, slots: int, slot_bytes: int) -> Tensor:
        try:
            return torch.empty(slots, slot_bytes, dtype=torch.uint8, device=self.device)
        except torch.cuda.OutOfMemoryError:
            raise BudgetError(
                f"the GPU has no {format_size(slots * slot_bytes)} free for expert slots: lower --vram, or "
                "end what else runs on it"
            ) from None

    def copy(self, source: Tensor, target: Tensor) -> torch.cuda.Event:
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            target[: source.numel()].copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        return event

    def landed(self, ticket: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(ticket)

    def done(self, ticket: torch.cuda.Event) -> None:
        ticket.synchronize()
