"""HostWorker: what the host does for a decode step that asks by the doorbell; ``in_flight.py`` has the threads.

Experts in RAM are computed without a word of Python. One that is on disk is fetched here while the step
waits for the answer, and what the coming layers will want is read behind it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from offload.experts.cache.tiered_cache import TieredCache
from offload.model.fused_linear import LEAST_WEIGHT
from offload.model.moe import native_expert
from offload.routing.frequency import Ids
from offload.tiers import Key
from quant.kernels.cuda.doorbell import BellBuffers, HostBell, first_byte
from quant.kernels.lookahead import FROM_EMBEDDING, FROM_PARTIAL, Lookahead
from quant.kernels.swiglu import SILU


class HostWorker:
    """The host's part of decode steps over the experts of ``cache``.

    ``routers`` ``[E, H]`` and the weights ``[H]`` of the ``norms`` before them, one of each per MoE layer,
    guess what to read from disk. ``prefetch_bytes`` of what the step hints at are read into the CPU's caches,
    from intermediate feature ``gpu_rows`` on. Experts of one layer must be stored alike. Raises SchemeError for
    those that no native kernel reads.
    """

    def __init__(
        self,
        buffers: BellBuffers,
        cache: TieredCache,
        routers: Sequence[Tensor],
        norms: Sequence[Tensor],
        *,
        exact: bool,
        prefetch_bytes: int = 0,
        gpu_rows: int = 0,
    ) -> None:
        store, shape = cache.store, cache.store.shape
        self.cache, self._layers = cache, shape.moe_layers
        records = [store.record(layer, 0) for layer in shape.moe_layers]
        samples = [native_expert(r.view(torch.empty(r.slot_bytes, dtype=torch.uint8)), SILU) for r in records]
        self.bell = HostBell(
            buffers,
            samples,
            cache.host_addresses,
            scales_input=shape.family.scales_input,
            exact=exact,
            prefetch_bytes=prefetch_bytes,
            gpu_rows=gpu_rows,
        )
        self._norms = [norm.float().cpu() for norm in norms]
        self.lookahead: Lookahead | None = None
        if not cache.holds_all:
            near = [router.float().cpu() for router in routers]
            self.lookahead = Lookahead(near, self._norms, shape.top_k)

    def fetch(self) -> None:
        """Answer the open request, of which something is on disk, and begin reading what is guessed to come:
        a step that waits for the disk once will do so again. Raises CheckpointError if the disk fails."""
        request = self.bell.request()
        layer = self._layers[request.layer]
        normed = self.bell.buffers.x.clone()  # the next request overwrites it
        self.bell.begin()
        for expert, weights in self.cache.fetch(layer, request.experts):
            self.bell.add(expert, first_byte(native_expert(weights, SILU)))
        self.bell.answer()
        if self.lookahead is not None:
            # Without the norm's weight it is the residual stream but for a positive factor.
            norm = self._norms[request.layer]
            residual = torch.where(norm.abs() > LEAST_WEIGHT, normed / norm, 0)
            expected = self.lookahead.guess(FROM_PARTIAL, request.layer, residual)
            self.cache.prefetch(self._keys(expected), {(layer, expert) for expert in request.experts})

    def look_ahead(self, embedding: Tensor) -> None:
        """Begin reading what a token of ``embedding`` f32 ``[1, H]`` will probably want first."""
        if self.lookahead is not None:
            self.cache.prefetch(self._keys(self.lookahead.guess(FROM_EMBEDDING, -1, embedding)), set())

    def _keys(self, expected: Sequence[tuple[int, int]]) -> list[Key]:
        return [(self._layers[row], expert) for row, expert in expected]

    def learn(self, chosen: Ids) -> None:
        """Compare guesses with what the token chose, ``[rows, k]``."""
        if self.lookahead is not None:
            for row, experts in enumerate(chosen.tolist()):
                self.lookahead.learn(row, experts)
