"""What a model does with a few tokens, watched on the meta device, where no number is computed.

Two steps are run: three tokens, then one more on the cache that they leave. They show which Linears are called
(and which are read past their ``forward``, so that they must stay as they are), how many experts a router
chooses, and what each layer keeps of a token. All of that holds for any family; none of it is in a config.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quant.errors import LIBRARY_ERRORS, CheckpointError

_TOKENS = 3


@dataclass(frozen=True)
class LayerCache:
    """What one layer keeps: ``per_token`` values of each token, of the last ``window`` only (0: of all), and
    ``state`` values however long the text is. ``heads`` of ``width`` where that is keys and values, else 0, and of
    ``value_width``: they differ where keys and values are compressed."""

    per_token: int
    window: int
    state: int
    heads: int = 0
    width: int = 0
    value_width: int = 0


@dataclass(frozen=True)
class MetaStep:
    """``called`` are the Linears that compute by their ``forward`` alone, ``top_k`` the experts that each experts
    module is asked for per token, ``caches`` what each layer keeps."""

    called: frozenset[str]
    top_k: Mapping[str, int]
    caches: tuple[LayerCache, ...]


class _WatchedLinear(nn.Linear):
    watched_name = ""
    called: set[str]
    read: set[str]

    def forward(self, input: Tensor) -> Tensor:
        self.called.add(self.watched_name)
        return input.new_empty(*input.shape[:-1], self.out_features)

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            self.read.add(self.watched_name)
        return super().__getattr__(name)


class _WatchedExperts(nn.Module):
    def __init__(self, name: str, top_k: dict[str, int]) -> None:
        super().__init__()
        self.name, self.top_k = name, top_k

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        self.top_k[self.name] = int(top_k_index.shape[-1])
        return hidden_states.new_empty(hidden_states.shape)


def watch_step(model: Any, experts: list[str]) -> MetaStep:
    """Run ``model``, which is on the meta device and of no further use, with its modules ``experts`` replaced.

    Raises CheckpointError for a model that cannot be followed so.
    """
    from transformers import DynamicCache

    called: set[str] = set()
    read: set[str] = set()
    top_k: dict[str, int] = {}
    for name in experts:
        model.set_submodule(name, _WatchedExperts(name, top_k))
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            watched: Any = module
            watched.__class__ = _WatchedLinear
            watched.watched_name, watched.called, watched.read = name, called, read
    cache = DynamicCache(config=model.config.get_text_config())
    try:
        with torch.no_grad():
            for count in (_TOKENS, 1):
                ids = torch.zeros(1, count, dtype=torch.long, device="meta")
                model(input_ids=ids, past_key_values=cache, use_cache=True)
    except LIBRARY_ERRORS as error:
        raise CheckpointError(
            f"transformers' {type(model).__name__} cannot be run on this config.json: {' '.join(str(error).split())}"
        ) from None
    return MetaStep(frozenset(called - read), top_k, tuple(_layer_cache(layer) for layer in cache.layers))


def _layer_cache(layer: Any) -> LayerCache:
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    tokens = 0 if keys is None else sum(t.numel() for t in (keys, values) if t is not None)
    indexer = getattr(layer, "indexer_keys", None)
    heads = width = value_width = 0
    plain = type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) and indexer is None
    if plain and keys is not None and values is not None and keys.shape[:3] == values.shape[:3]:
        (_, heads, _, width), value_width = keys.shape, values.shape[3]
    tokens += 0 if indexer is None else indexer.numel()
    states = 0
    for name in ("conv_states", "recurrent_states"):
        held = getattr(layer, name, None)
        for tensor in held.values() if isinstance(held, dict) else held or ():
            states += 0 if tensor is None else tensor.numel()
    window = int(getattr(layer, "sliding_window", 0) or 0)
    return LayerCache(tokens // (_TOKENS + 1), window, states, heads, width, value_width)
