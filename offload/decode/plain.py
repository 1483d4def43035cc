"""PlainDecoder: the model's own modules, with the experts where our cache has them. Runs everything that
transformers runs, and stands for a step that neither native code nor a CUDA graph can take."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from offload.decode.decoder import Decoder
from offload.experts.cache.expert_cache import ExpertCache
from offload.model.kv_cache import SequenceCache
from quant.architecture.meta_model import decoder_of
from quant.kernels import native

_AWAKE = 5000  # microseconds, of a layer's Python between two products
_TRIAL = [3, 1, 4, 1, 5, 9, 2]
_SAME = 0.02  # relative: what bf16 makes of another order of sums


class PlainDecoder(Decoder):
    """transformers' ``model`` on ``device``, its experts in ``experts``; ``bound`` is the one cache that it can use
    where that is transformers' own."""

    def __init__(self, model: Any, experts: ExpertCache, device: torch.device, name: str, bound: Any = None) -> None:
        super().__init__()
        self.bound = self._stock = bound
        self._alone = False  # one token is on its way, on the CPU
        self.model, self.experts, self.device, self.name = model, experts, device, name
        for layer in decoder_of(model).layers:
            layer.register_forward_pre_hook(lambda *call: self._at_layer())

    def forward(self, ids: Sequence[int], cache: SequenceCache, *, keep: int = 1) -> Tensor:
        """See Decoder."""
        if self._stock is not None:
            self._stock.check(len(ids))
        if len(ids) > 1 and cache.get_seq_length() and not self.continues:
            return torch.cat([self._run([token], cache, 1) for token in ids][-keep:])
        return self._run(ids, cache, keep)

    @cached_property
    def continues(self) -> bool:
        """See Decoder. Tried once where states are kept: some modules of transformers begin anew with every call for
        more than one token."""
        if self._stock is None or not getattr(self._stock, "folds", False):
            return True
        together, apart = self._stock.empty(), self._stock.empty()
        for cache in (together, apart):
            self._run(_TRIAL[:4], cache, 1)
        expected = torch.cat([self._run([token], apart, 1) for token in _TRIAL[4:]])
        found = self._run(_TRIAL[4:], together, len(_TRIAL) - 4)
        return bool((found - expected).norm() <= _SAME * expected.norm())

    def _at_layer(self) -> None:
        self.check_wanted()
        if self._alone:
            native.keep_awake(_AWAKE)

    def _run(self, ids: Sequence[int], cache: SequenceCache, keep: int) -> Tensor:
        if len(ids) > 1 or self.device.type != "cpu":
            return self._call(ids, cache, keep)
        # What torch does with one token is little, and its threads would keep the cores from those of the kernels,
        # which stay awake: both cost more than all of the step's Python.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        self._alone = True
        try:
            return self._call(ids, cache, keep)
        finally:
            self._alone = False
            torch.set_num_threads(threads)

    def _call(self, ids: Sequence[int], cache: SequenceCache, keep: int) -> Tensor:
        inputs = torch.tensor([list(ids)], device=self.device)
        logits: Tensor = self.model(
            input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=keep
        ).logits[0]
        if self.device.type == "cuda":  # an error of the GPU shows here; copies of experts beside it go on
            torch.cuda.current_stream(self.device).synchronize()
        return logits

    def attend(self) -> None:
        """Move experts to where they are wanted: no step is under way."""
        self.experts.rebalance()
