"""What transformers' own attention keeps of a text, where a family's attention is none of those that we compute:
compressed keys and values, sliding windows, states of linear attention.

transformers' cache of the family is used as it is. Forgetting the latest tokens is exact for keys and values that
are all still there. States that were folded into one another, and windows that have moved on, cannot go back: the
whole text is then run again.
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
        self._config = config.get_text_config()
        super().__init__(config=self._config)
        self.context, self.limit = context, shape.max_position_embeddings

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

    def rewind(self, length: int) -> int:
        """Keep the first ``length`` tokens and return how many are kept: ``length``, or 0 if a layer cannot go
        back."""
        surplus = self.get_seq_length() - length
        if surplus <= 0:
            return length
        if not length or not all(_goes_back(layer) for layer in self.layers):
            self.reset()
            return 0
        self.crop(-surplus)
        return length

    def reset(self) -> None:
        """Forget everything."""
        super().__init__(config=self._config)

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
    return KVCache(shape, context, storage) if shape.is_native else StockCache(shape, config, context)


def _goes_back(layer: Any) -> bool:
    """Whether the latest tokens can be taken out of ``layer`` as if they had never been."""
    if not isinstance(layer, DynamicLayer) or hasattr(layer, "recurrent_states"):
        return False
    window = getattr(layer, "sliding_window", None)
    return window is None or layer.get_seq_length() < window


def _tensors(held: dict[Any, Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in held.values():
        if isinstance(value, dict):
            found += _tensors(value)
        elif isinstance(value, Tensor):
            found.append(value)
    return found
