"""What transformers' own attention keeps of a text, where a family's attention is none of those that we compute:
compressed keys and values, sliding windows, states of linear attention.

transformers' cache of the family is used as it is. Forgetting the latest tokens is exact for keys and values that
are all still there. States that were folded into one another, and windows that have moved on, cannot go back: what
they were at a bookmark is kept, so that tokens after it can be taken back together; without one the whole text is run
again.
"""

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from offload.model.kv_cache import KVCache, Storage
from quant.errors import BudgetError
from quant.model.shape import ModelShape


class StockCache(DynamicCache):
    """transformers' cache of one sequence, of at most ``context`` tokens, for a model with ``config``."""

    def __init__(self, shape: ModelShape, config: Any, context: int) -> None:
        self._config, self._shape = config.get_text_config(), shape
        super().__init__(config=self._config)
        self.context, self.limit = context, shape.max_position_embeddings
        self._bookmark: tuple[int, dict[int, dict[str, Any]]] | None = None

    def remedy(self, needed: int, wanted: int) -> str:
        """What to do where ``needed`` tokens, at best ``wanted``, do not fit: nothing beyond what the model reads."""
        if 0 < self.limit < needed:
            return f"the model was made for no more than {self.limit:,}: shorten the text"
        return f"start again with --context {min(wanted, self.limit or wanted)}"

    def check(self, tokens: int) -> None:
        """Raise BudgetError if ``tokens`` more do not fit the planned context."""
        end = self.get_seq_length() + tokens
        if end > self.context:
            raise BudgetError(
                f"the KV cache is planned for {self.context:,} tokens: start again with --context {2 * end}"
            )

    @property
    def folds(self) -> bool:
        """Whether a layer keeps a state that tokens are folded into."""
        return any(hasattr(layer, "recurrent_states") for layer in self.layers)

    def empty(self) -> "StockCache":
        """Another one for the same model."""
        return StockCache(self._shape, self._config, self.context)

    @property
    def reversible(self) -> int:
        """How many tokens more could all be taken back again, after a bookmark."""
        return self.context - self.get_seq_length()

    def bookmark(self) -> None:
        """Keep what layers that cannot go back are now: what comes next may have to be taken back. Forgotten with the
        next bookmark, and once gone back to."""
        kept = {i: _copied(vars(layer)) for i, layer in enumerate(self.layers) if not _always_goes_back(layer)}
        self._bookmark = self.get_seq_length(), kept

    def rewind(self, length: int) -> int:
        """Keep the first ``length`` tokens and return how many are kept: ``length``; if a layer cannot go back as many
        as there were at the bookmark, or 0."""
        surplus = self.get_seq_length() - length
        if surplus <= 0:
            return length
        marked, self._bookmark = self._bookmark, None
        if length and all(_goes_back(layer) for layer in self.layers):
            self.crop(-surplus)
            return length
        if marked is None or not 0 < marked[0] <= length:
            self.reset()
            return 0
        surplus += length - marked[0]
        layers: list[Any] = self.layers
        for index, layer in enumerate(layers):
            if index in marked[1]:
                vars(layer).clear()
                vars(layer).update(marked[1][index])
            else:
                layer.crop(-surplus)
        return marked[0]

    def reset(self) -> None:
        """Forget everything."""
        super().__init__(config=self._config)
        self._bookmark = None

    @property
    def read_nbytes(self) -> int:
        """Bytes that one decode step reads of what is kept."""
        return self.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return sum(tensor.nbytes for layer in self.layers for tensor in _tensors(vars(layer)))


def cache_of(shape: ModelShape, config: Any, context: int, storage: Storage) -> Any:
    """The cache of a run of ``shape``: a KVCache in ``storage`` where attention is ours, else a StockCache."""
    return KVCache(shape, context, storage) if shape.keeps_pages else StockCache(shape, config, context)


def _goes_back(layer: Any) -> bool:
    """Whether the latest tokens can be taken out of ``layer`` as if they had never been."""
    if _always_goes_back(layer):
        return True
    window = getattr(layer, "sliding_window", None)
    return window is not None and not hasattr(layer, "recurrent_states") and layer.get_seq_length() < window


def _always_goes_back(layer: Any) -> bool:
    """Whether ``layer`` keeps the keys and values of all tokens, and nothing else."""
    folded = hasattr(layer, "recurrent_states") or getattr(layer, "sliding_window", None) is not None
    return isinstance(layer, DynamicLayer) and not folded


def _copied(held: Any) -> Any:
    """``held`` with tensors of its own."""
    if isinstance(held, dict):
        return {key: _copied(value) for key, value in held.items()}
    if isinstance(held, list):
        return [_copied(value) for value in held]
    return held.clone() if isinstance(held, Tensor) else held


def _tensors(held: dict[Any, Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in held.values():
        if isinstance(value, dict):
            found += _tensors(value)
        elif isinstance(value, Tensor):
            found.append(value)
    return found
