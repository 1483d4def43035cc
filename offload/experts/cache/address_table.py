"""AddressTable: where the device finds each expert, in memory that its kernels read.

Kernels look experts up by (layer, expert), so that a slot can change under a captured graph. The host notes
changes as they happen, and ``flush`` posts them in the compute queue: between two steps, never within one.
Rows are MoE layers in order.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from offload.experts.storage.transfer import Transfer
from offload.routing.frequency import Mask
from offload.tiers import Key

VRAM, PINNED, ELSEWHERE = 0, 1, 2
Places = npt.NDArray[np.uint8]


class AddressTable:
    """``addresses`` int64 and ``places`` uint8, both ``[rows, experts]`` on the device and never reallocated:
    the address of an expert's first byte, 0 where the device has none, and VRAM, PINNED or ELSEWHERE.

    ``noted_addresses`` and ``noted_places``, on the host, are what the next flush will post; ``posted_places``
    is what the last one did, for the compute queued since. Others only read them.
    """

    def __init__(self, layers: Sequence[int], experts: int, transfer: Transfer) -> None:
        self.transfer = transfer
        self._row = {layer: row for row, layer in enumerate(layers)}
        rows = len(self._row)
        self.addresses, *self._post_addresses = transfer.table(rows, experts, torch.int64)
        self.places, *self._post_places = transfer.table(rows, experts, torch.uint8)
        self._addresses = torch.zeros(rows, experts, dtype=torch.int64)
        self._places = torch.full((rows, experts), ELSEWHERE, dtype=torch.uint8)
        # Flat numpy views of the same memory: one element of a tensor costs microseconds.
        self.noted_addresses, self.noted_places = self._addresses.numpy(), self._places.numpy()
        self._turn, self._tickets = 0, [transfer.mark(), transfer.mark()]
        self.posted_places: Places = self._post_places[0].numpy()
        self._dirty = True
        self.flush()

    def row(self, layer: int) -> int:
        """The row of MoE layer ``layer``."""
        return self._row[layer]

    def set(self, key: Key, place: int, address: int) -> None:
        """From the next flush on, ``key`` is found at ``address`` in ``place``."""
        at = self._row[key[0]], key[1]
        self.noted_addresses[at], self.noted_places[at] = address, place
        self._dirty = True

    def clear(self, key: Key) -> None:
        """From the next flush on, the device does not find ``key``."""
        self.set(key, ELSEWHERE, 0)

    def mask(self, keys: Iterable[Key]) -> Mask:
        """``keys`` as bool ``[rows, experts]``."""
        found: Mask = np.zeros(self.noted_places.shape, dtype=bool)
        for layer, expert in keys:
            found[self._row[layer], expert] = True
        return found

    def flush(self) -> None:
        """Post what was noted in the compute queue, if anything was."""
        if not self._dirty:
            return
        turn = self._turn = 1 - self._turn
        self.transfer.done(self._tickets[turn])  # posted the flush before last: as good as always over
        addresses, places = self._post_addresses[turn], self._post_places[turn]
        addresses.copy_(self._addresses)
        places.copy_(self._places)
        self.transfer.post(addresses, self.addresses)
        self._tickets[turn] = self.transfer.post(places, self.places)
        self.posted_places = places.numpy()
        self._dirty = False
