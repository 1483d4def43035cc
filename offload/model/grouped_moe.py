"""GroupedExperts: the routed experts of a prompt's chunk, computed while the cold ones arrive.

Tokens are grouped by expert once per layer. What is in VRAM is computed at once, every other expert as it
lands in a staging slot, and once a layer's copies are under way those of the next layer's likely experts begin.

Legend: T tokens, k experts per token, H hidden, E experts.
"""

import numpy as np
import torch
from torch import Tensor

from offload.experts.cache.tiered_cache import TieredCache
from offload.experts.storage.layout import layer_layout
from offload.routing.frequency import Ids
from quant.errors import SchemeError
from quant.kernels.cuda.layout import ExpertLayout
from quant.kernels.cuda.prefill import PrefillScratch, arrange_tokens, combine, group_tokens, moe_prefill


class GroupedExperts:
    """Runs the experts of ``cache`` on many tokens at once, each read by its address."""

    def __init__(self, cache: TieredCache, scales_input: bool) -> None:
        self.cache, self.scales_input = cache, scales_input
        self._layouts: dict[int, ExpertLayout | None] = {}
        self._scratch: PrefillScratch | None = None

    def reads(self, layer: int) -> bool:
        """Whether the grouped kernels read the experts of ``layer``."""
        return self._layout(layer) is not None

    def run(self, layer: int, x: Tensor, chosen: Tensor, ids: Ids, scores: Tensor) -> Tensor:
        """x bf16 ``[T, H]``, chosen int64 ``[T, k]``, which are ``ids`` on the host, and scores ``[T, k]`` →
        the routed experts' sum ``[T, H]``. Raises CheckpointError if the disk fails."""
        layout, cache = self._layout(layer), self.cache
        assert layout is not None, "reads() says so"
        tokens, k = chosen.shape
        experts = cache.store.shape.num_experts
        groups = group_tokens(chosen, scores.float(), experts, scales_input=self.scales_input)
        scratch = self._room(layout, tokens * k, x.device)
        arrange_tokens(x, groups, layout, scratch)
        out = torch.empty(tokens * k, x.shape[1], dtype=x.dtype, device=x.device)
        for batch in cache.batches(layer, ids, self._ahead(layer, tokens * k), tokens=tokens):
            addresses = np.zeros(experts, dtype=np.int64)
            for expert, slot in batch.items():
                addresses[expert] = cache.vram.address(slot, (layer, expert))
            arrived = cache.vram.transfer.send(np.array(list(batch), dtype=np.int32))
            moe_prefill(groups, arrived, cache.vram.transfer.send(addresses), layout, scratch, out)
        return combine(out, k)

    def _ahead(self, layer: int, requests: int) -> list[tuple[int, int]]:
        """The experts that the next MoE layer will need for as many ``requests``, if any are that likely."""
        layers = self.cache.store.shape.moe_layers
        row = self.cache.vram.address_table.row(layer) + 1
        if row == len(layers):
            return []
        return [(layers[row], expert) for expert in self.cache.frequency.likely(layers[row], requests)]

    def _layout(self, layer: int) -> ExpertLayout | None:
        if layer not in self._layouts:
            try:
                self._layouts[layer] = layer_layout(self.cache.store, layer)
            except SchemeError:
                self._layouts[layer] = None
        return self._layouts[layer]

    def _room(self, layout: ExpertLayout, pairs: int, device: torch.device) -> PrefillScratch:
        if self._scratch is None or self._scratch.tokens.shape[0] < pairs:
            self._scratch = None  # before the larger one is made
            self._scratch = PrefillScratch.allocate(layout, pairs, device)
        return self._scratch
