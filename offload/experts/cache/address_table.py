"""AddressTable: where the device finds each expert, in memory that its kernels read.

Kernels look experts up by (layer, expert), so that a slot can change under a captured graph. The host keeps
the tables as they should be, and ``flush`` posts them in the compute queue: between two steps, never within
one. Rows are MoE layers in order.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from offload.experts.storage.transfer import Transfer
from offload.tiers import Key

VRAM, PINNED, ELSEWHERE = 0, 1, 2


class AddressTable:
    """``addresses`` int64 and ``places`` uint8, both ``[rows, experts]`` on the device and never reallocated:
    the address of an expert's first byte, 0 where the device has none, and VRAM, PINNED or ELSEWHERE."""

    def __init__(self, layers: Sequence[int], experts: int, transfer: Transfer) -> None:
        self.transfer = transfer
        self._row = {layer: row for row, layer in enumerate(layers)}
        rows = len(self._row)
        self.addresses, *self._posted_addresses = transfer.table(rows, experts, torch.int64)
        self.places, *self._posted_places = transfer.table(rows, experts, torch.uint8)
        self._addresses = torch.zeros(rows, experts, dtype=torch.int64)
        self._places = torch.full((rows, experts), ELSEWHERE, dtype=torch.uint8)
        # Flat numpy views of the same memory: one element of a tensor costs microseconds.
        self._set_address, self._set_place = self._addresses.numpy(), self._places.numpy()
        self._turn, self._tickets = 0, [transfer.mark(), transfer.mark()]
        self._exposed = self._posted_places[0].numpy()
        self._dirty = True
        self.flush()

    def row(self, layer: int) -> int:
        """The row of MoE layer ``layer``."""
        return self._row[layer]

    def set(self, key: Key, place: int, address: int) -> None:
        """From the next flush on, ``key`` is found at ``address`` in ``place``."""
        row, expert = self._row[key[0]], key[1]
        self._set_address[row, expert], self._set_place[row, expert] = address, place
        self._dirty = True

    def clear(self, key: Key) -> None:
        """From the next flush on, the device does not find ``key``."""
        self.set(key, ELSEWHERE, 0)

    def place(self, key: Key) -> int:
        """Where ``key`` is, as the next flush will say."""
        return int(self._set_place[self._row[key[0]], key[1]])

    def exposed(self, key: Key) -> int:
        """Where ``key`` is for compute queued after the last flush."""
        return int(self._exposed[self._row[key[0]], key[1]])

    def exposed_places(self) -> npt.NDArray[np.uint8]:
        """Places ``[rows, experts]`` for compute queued after the last flush; not to be written to."""
        return self._exposed

    def flush(self) -> None:
        """Post the tables in the compute queue, if they have changed."""
        if not self._dirty:
            return
        turn = self._turn = 1 - self._turn
        self.transfer.done(self._tickets[turn])  # posted the flush before last: as good as always over
        addresses, places = self._posted_addresses[turn], self._posted_places[turn]
        addresses.copy_(self._addresses)
        places.copy_(self._places)
        self.transfer.post(addresses, self.addresses)
        self._tickets[turn] = self.transfer.post(places, self.places)
        self._exposed = places.numpy()
        self._dirty = False

    def where(self) -> npt.NDArray[np.uint8]:
        """Places ``[rows, experts]`` as the next flush will say; not to be written to."""
        return self._set_place
