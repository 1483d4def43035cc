"""The KV cache of one sequence: what attention may still look at, and no more.

A full layer keeps every token. A chunked layer (Llama 4) attends within chunks of ``attention_chunk_size``
tokens, so it keeps the current chunk only: that is what makes long contexts fit. transformers' own chunked
cache keeps a sliding window instead, and its quantized caches reject such layers.

A layer's keys and values lie in one piece here, allocated once for the planned context: a CUDA graph keeps their
addresses. Where several sequences share the memory they lie in pages (``paged_cache.py``). Values are stored as
bf16, int8 (one f32 scale per token and head) or as they come.

Legend: B = 1 sequence, h KV heads, T tokens, d head_dim.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from quant.errors import BudgetError
from quant.model.shape import ModelShape

Storage = Literal["bf16", "int8", "plain"]
STORAGES: dict[int, Storage] = {8: "int8", 16: "bf16", 32: "plain"}  # by bits of a value


def remedy(limit: int, needed: int, wanted: int) -> str:
    """What to do where ``needed`` tokens, at best ``wanted``, do not fit: nothing beyond ``limit``, which the model was
    made for (0: not known)."""
    if 0 < limit < needed:
        return f"the model was made for no more than {limit:,}: shorten the text"
    return f"start again with --context {min(wanted, limit or wanted)}"


class KVBuffer:
    """Keys or values of one layer, ``[h, capacity, d]`` in its storage form."""

    def __init__(self, capacity: int, storage: Storage) -> None:
        self.capacity, self.storage = capacity, storage
        self.data: Tensor | None = None
        self.scale: Tensor | None = None

    def allocate(self, heads: int, width: int, plain: torch.dtype, device: torch.device) -> Tensor:
        """The buffer ``[h, capacity, d]``, made on first use; ``plain`` is the dtype of plain storage."""
        if self.data is None:
            dtype = {"bf16": torch.bfloat16, "int8": torch.int8, "plain": plain}[self.storage]
            self.data = torch.empty(heads, self.capacity, width, dtype=dtype, device=device)
            if self.storage == "int8":
                self.scale = torch.empty(heads, self.capacity, 1, dtype=torch.float32, device=device)
        return self.data

    def write(self, states: Tensor, start: int) -> None:
        """Store ``states`` ``[1, h, T, d]`` at tokens ``start`` onwards."""
        _, heads, tokens, width = states.shape
        data = self.allocate(heads, width, states.dtype, states.device)
        values = states[0]
        if self.scale is not None:
            scale = values.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
            self.scale[:, start : start + tokens] = scale
            values = (values.float() / scale).round()
        data[:, start : start + tokens] = values.to(data.dtype)

    def read(self, length: int, dtype: torch.dtype) -> Tensor:
        """The first ``length`` tokens as ``[1, h, length, d]`` in ``dtype``."""
        assert self.data is not None
        values = self.data[:, :length].to(dtype)
        if self.scale is not None:
            values = values * self.scale[:, :length].to(dtype)
        return values[None]

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(t.nbytes for t in (self.data, self.scale) if t is not None)


class CachedLayer(CacheLayerMixin):
    """What one layer keeps: every token up to ``context`` with ``chunk`` 0, else those of the current chunk."""

    is_compileable = False
    is_croppable = True

    def __init__(self, context: int, chunk: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.context, self.chunk = context, chunk
        self.seen = 0  # tokens of the sequence so far
        self.start = 0  # position of the first token kept
        self.is_sliding = bool(chunk)
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Memory is taken at the first write."""

    def chunk_at(self, position: int) -> int:
        """Where the chunk of ``position`` begins."""
        return position // self.chunk * self.chunk if self.chunk else 0

    def advance(self, tokens: int) -> None:
        """``tokens`` more, within one chunk, have been appended."""
        self.seen += tokens
        self.start = self.chunk_at(self.seen)

    def check(self, tokens: int) -> None:
        """Raise BudgetError if ``tokens`` more do not fit the planned context."""
        if self.seen + tokens > self.context:
            end = self.seen + tokens
            raise BudgetError(
                f"the KV cache is planned for {self.context:,} tokens: start again with --context {2 * end}"
            )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys that ``update`` will return for ``query_length`` new tokens, position of the first)."""
        return self.seen - self.start + query_length, self.start

    def get_seq_length(self) -> int:
        """Tokens of the sequence so far."""
        return self.seen

    def get_max_length(self) -> int:
        """Tokens the layer can follow."""
        return self.context

    @property
    def token_nbytes(self) -> int:
        """Bytes that a token takes."""
        raise NotImplementedError

    @property
    def kept_nbytes(self) -> int:
        """Bytes of the tokens kept."""
        return (self.seen - self.start) * self.token_nbytes

    @property
    def reversible(self) -> int:
        """How many tokens more could all be taken back again: those that end no chunk."""
        return (self.start + self.chunk - 1 if self.chunk else self.context) - self.seen

    def rewind(self, length: int) -> bool:
        """Forget all tokens from ``length`` on; False if tokens before ``length`` are no longer kept."""
        if length < self.start:
            return False
        self.seen = length
        return True

    def reset(self) -> None:
        """Forget everything."""
        self.seen = self.start = 0


class KVLayer(CachedLayer):
    """One layer's keys and values in one piece."""

    def __init__(self, context: int, chunk: int, storage: Storage) -> None:
        super().__init__(context, chunk)
        capacity = min(chunk, context) if chunk else context
        self.key_buffer, self.value_buffer = KVBuffer(capacity, storage), KVBuffer(capacity, storage)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append ``[1, h, T, d]`` and return all keys and values that the new tokens may attend to.

        Raises BudgetError if the planned context is exceeded.
        """
        tokens = key_states.shape[2]
        kept, end = self.seen - self.start, self.seen + tokens
        self.check(tokens)
        self.seen = end
        first = self.chunk_at(end)  # where the next token's chunk begins
        if first <= self.start:
            self.key_buffer.write(key_states, kept)
            self.value_buffer.write(value_states, kept)
            dtype = key_states.dtype
            return self.key_buffer.read(kept + tokens, dtype), self.value_buffer.read(kept + tokens, dtype)
        # The step ends in another chunk: attend over the old one and the new tokens, keep what the next may
        # see.
        keys, values = (
            self._joined(self.key_buffer, key_states, kept),
            self._joined(self.value_buffer, value_states, kept),
        )
        keep = end - max(first, self.start)
        if keep:
            self.key_buffer.write(keys[:, :, -keep:], 0)
            self.value_buffer.write(values[:, :, -keep:], 0)
        self.start = first
        return keys, values

    @staticmethod
    def _joined(buffer: KVBuffer, states: Tensor, kept: int) -> Tensor:
        return torch.cat((buffer.read(kept, states.dtype), states), 2) if kept else states

    @property
    def token_nbytes(self) -> int:
        """See CachedLayer."""
        return (self.key_buffer.nbytes + self.value_buffer.nbytes) // self.key_buffer.capacity


class SequenceCache(Cache):
    """The KV cache of one sequence over all layers of a model, which are ``kept``."""

    def __init__(self, kept: Sequence[CachedLayer], context: int) -> None:
        super().__init__(layers=list(kept))
        self.kept, self.context = kept, context

    def rewind(self, length: int) -> int:
        """Keep the first ``length`` tokens and return how many are kept: ``length``, or 0 if a chunked layer
        has forgotten what lies before it."""
        if length < self.get_seq_length() and not all(length >= layer.start for layer in self.kept):
            self.reset()  # type: ignore[no-untyped-call]
            return 0
        for layer in self.kept:
            layer.rewind(length)
        return length

    @property
    def reversible(self) -> int:
        """How many tokens more could all be taken back again."""
        return min(layer.reversible for layer in self.kept)

    def bookmark(self) -> None:
        """What comes next may have to be taken back."""

    @property
    def read_nbytes(self) -> int:
        """Bytes that one decode step reads of what is kept."""
        return sum(layer.kept_nbytes for layer in self.kept)


class KVCache(SequenceCache):
    """The one sequence of a model that keeps its keys and values in one piece."""

    def __init__(self, shape: ModelShape, context: int, storage: Storage) -> None:
        chunk = shape.attention_chunk_size
        layers = [
            KVLayer(context, chunk if layer in shape.chunked_layers else 0, storage)
            for layer in range(shape.num_layers)
        ]
        super().__init__(layers, context)
        self.pieces = layers

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(layer.key_buffer.nbytes + layer.value_buffer.nbytes for layer in self.pieces)
