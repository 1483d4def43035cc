"""The KV cache in pages, which sequences share: what no token has reached is nobody's, and what two sequences begin
with is there once.

A page holds what one layer keeps of 128 tokens of a sequence. A page that more than one sequence uses is copied before
one of them writes to it; pages of chunks that are over go back to the pool.

Legend: h KV heads, T tokens, d head_dim, P pages.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from offload.batch.pages import OutOfPages
from offload.model.kv_cache import CachedLayer, SequenceCache
from offload.model.page_pool import PagePool
from offload.prompts.spill_file import Stretch
from quant.errors import ColdstreamError
from quant.kernels.attention import PAGE_ON_DISK
from quant.sizes import KV_PAGE_TOKENS

NO_PAGE = -1


class PagedLayer(CachedLayer):
    """One layer of a sequence. ``table`` int32 ``[blocks]`` names the page of tokens 128 i and after, or says NO_PAGE,
    or PAGE_ON_DISK for what is on disk."""

    def __init__(self, pool: PagePool, chunk: int, table: Tensor) -> None:
        super().__init__(pool.context, chunk)
        self.pool, self.table, self._pages = pool, table, table.numpy()
        self.on_disk: list[Stretch] = []  # its first pages, if it attends to everything
        if pool.disk is not None and not chunk:
            pool.disk.enter(self, table.data_ptr())

    def reserve(self, tokens: int) -> None:
        """Have pages for ``tokens`` more, which nobody else uses.

        Raises BudgetError if the planned context is exceeded, OutOfPages if there are no more pages.
        """
        self.check(tokens)
        first, last = self.seen // KV_PAGE_TOKENS, (self.seen + tokens - 1) // KV_PAGE_TOKENS
        for block in range(first, last + 1):
            page = int(self._pages[block])
            self._pages[block] = self.pool.counts.take() if page == NO_PAGE else self.pool.own(page)

    def advance(self, tokens: int) -> None:
        """See CachedLayer; a chunk that is over gives its pages back."""
        before = self.start
        super().advance(tokens)
        if self.start != before:
            self._give_back(before // KV_PAGE_TOKENS, self.start // KV_PAGE_TOKENS)

    def spans(self, tokens: int) -> Iterator[tuple[int, int]]:
        """Where the native attention may append ``tokens`` new tokens: (first, count) of each part that stays within
        one chunk. A part counts as seen once the next is asked for.

        Raises BudgetError if the planned context is exceeded, OutOfPages if there are no more pages.
        """
        self.check(tokens)
        done = 0
        while done < tokens:
            room = self.start + self.chunk - self.seen if self.chunk else tokens
            count = min(tokens - done, room)
            self.reserve(count)
            yield done, count
            done += count
            self.advance(count)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append ``[1, h, T, d]`` and return all keys and values that the new tokens may attend to.

        Raises BudgetError if the planned context is exceeded, OutOfPages if there are no more pages.
        """
        tokens, dtype = key_states.shape[2], key_states.dtype
        self.check(tokens)
        start, seen, end = self.start, self.seen, self.seen + tokens
        if self.chunk_at(end) == start:
            self.reserve(tokens)
            self._write(key_states, value_states, seen)
            self.advance(tokens)
            return self._read(start, end, dtype)
        # The step ends in another chunk: attend over the old one and the new tokens, keep what the next may see.
        states = (key_states, value_states)
        if seen > start:
            kept = self._read(start, seen, dtype)
            states = torch.cat((kept[0], key_states), 2), torch.cat((kept[1], value_states), 2)
        self._give_back(0, len(self._pages))
        self.seen = self.start = self.chunk_at(end)
        if self.start < end:
            self.reserve(end - self.start)
            self._write(states[0][:, :, self.start - end :], states[1][:, :, self.start - end :], self.start)
            self.advance(end - self.start)
        return states

    def share_with(self, other: "PagedLayer", length: int) -> None:
        """Let ``other``, which is empty, begin with this layer's first ``length`` tokens."""
        other.seen, other.start = length, other.chunk_at(length)
        first, end = other.start // KV_PAGE_TOKENS, -(-length // KV_PAGE_TOKENS)
        for stretch in self.on_disk[: self._stretches(length)]:
            stretch.users += 1
            other.went(stretch)
        first = max(first, len(other.on_disk) * self._stretch)
        if first < end and self._pages[first] == PAGE_ON_DISK:
            other._restore(self.on_disk[len(other.on_disk)], first, end)
            return
        for block in range(first, end):
            page = int(self._pages[block])
            self.pool.counts.share(page)
            other._pages[block] = page

    def make_places(self, length: int) -> Iterator[tuple[int, int]]:
        """Have pages for what attention looks at after ``length`` tokens, at least those that are there: block and page
        of each that is not there yet. Raises OutOfPages."""
        first, whole = self.chunk_at(length) // KV_PAGE_TOKENS, self.seen // KV_PAGE_TOKENS
        self._give_back(0, first)
        self._give_back(max(first, whole), len(self._pages))  # the last in part: it is to be read as a whole
        for block in range(max(first, whole), -(-length // KV_PAGE_TOKENS)):
            self._pages[block] = self.pool.counts.take()
            yield block, int(self._pages[block])

    def rewind(self, length: int) -> bool:
        """See CachedLayer."""
        if not super().rewind(length):
            return False
        whole, end = self._stretches(length), -(-length // KV_PAGE_TOKENS)
        self._give_back(end, len(self._pages))
        for stretch in self.on_disk[whole:][::-1]:
            first = whole * self._stretch
            self.on_disk.pop()
            self._pages[len(self.on_disk) * self._stretch :][: self._stretch] = NO_PAGE
            if len(self.on_disk) == whole and first < end:
                self._restore(stretch, first, end)
            self._let_go(stretch)
        return True

    def reset(self) -> None:
        """See CachedLayer."""
        super().reset()
        self._give_back(0, len(self._pages))
        while self.on_disk:
            self._let_go(self.on_disk.pop())

    def in_memory(self, count: int) -> list[int]:
        """Its ``count`` oldest pages that are not on disk."""
        first = len(self.on_disk) * self._stretch
        return [int(page) for page in self._pages[first : first + count]]

    def went(self, stretch: Stretch) -> None:
        """The oldest pages in memory are on disk now."""
        first = len(self.on_disk) * self._stretch
        self._give_back(first, first + self._stretch)
        self._pages[first : first + self._stretch] = PAGE_ON_DISK
        self.on_disk.append(stretch)

    def _restore(self, stretch: Stretch, first: int, end: int) -> None:
        """Have those of blocks ``first`` to ``end`` that are in ``stretch`` in memory again."""
        disk, counts = self.pool.disk, self.pool.counts
        assert disk is not None
        while counts.free < end - first:  # without asking who might give up what this is for
            if not disk.spill():
                raise OutOfPages(f"all {counts.count:,} pages of the KV cache are in use: give it more with --kv-ram")
        pages = [counts.take() for _ in range(first, end)]
        self._pages[first:end] = pages
        disk.restore(stretch, pages)

    def _let_go(self, stretch: Stretch) -> None:
        assert self.pool.disk is not None
        self.pool.disk.let_go(stretch)

    def _stretches(self, length: int) -> int:
        """How many of those on disk hold none but the first ``length`` tokens."""
        return min(len(self.on_disk), length // (self._stretch * KV_PAGE_TOKENS))

    @property
    def _stretch(self) -> int:
        """Pages of a stretch."""
        return 1 if self.pool.disk is None else self.pool.disk.tiers.stretch

    @property
    def token_nbytes(self) -> int:
        """See CachedLayer."""
        return self.pool.token_nbytes

    def _give_back(self, first: int, end: int) -> None:
        table = self._pages[first:end]
        for page in table[table >= 0].tolist():
            self.pool.counts.give_back(page)
        table[table >= 0] = NO_PAGE

    def _places(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Page and row of each token from ``start`` to ``end``."""
        tokens = torch.arange(start, end)
        device = self.pool.pages.keys.device
        return self.table[tokens // KV_PAGE_TOKENS].long().to(device), (tokens % KV_PAGE_TOKENS).to(device)

    def _write(self, key_states: Tensor, value_states: Tensor, start: int) -> None:
        if self.pool.shape.latent:
            key_states, value_states = torch.cat((key_states, value_states), -1).chunk(2, -1)
        page, row = self._places(start, start + key_states.shape[2])
        pages, stored = self.pool.pages, list[Tensor]()
        for states, scales in ((key_states, pages.key_scale), (value_states, pages.value_scale)):
            values = states[0].transpose(0, 1)  # [T, h, d]
            if scales is not None:
                scale = values.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
                scales[page, :, row] = scale[..., 0]
                values = (values.float() / scale).round()
            stored.append(values)
        pages.write(page, row, *stored)

    def _read(self, start: int, end: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        page, row = self._places(start, end)
        pages = self.pool.pages

        def states(stored: Tensor, scales: Tensor | None) -> Tensor:
            values = stored.to(dtype)  # [T, h, d]
            if scales is not None:
                values = values * scales[page, :, row, None].to(dtype)
            return values.transpose(0, 1)[None]

        keys, values = pages.read(page, row)
        found = states(keys, pages.key_scale), states(values, pages.value_scale)
        latent = self.pool.shape.latent
        return torch.cat(found, -1).tensor_split([latent], -1) if latent else found  # type: ignore[return-value]


class PagedCache(SequenceCache):
    """One sequence's keys and values in pages of ``pool``. ``tables`` int32 ``[layers, blocks]``."""

    def __init__(self, pool: PagePool) -> None:
        shape, blocks = pool.shape, -(-pool.context // KV_PAGE_TOKENS)
        self.pool, self._written = pool, -1  # up to which token the last page is known to be this sequence's own
        self.tables = torch.full((shape.num_layers, blocks), NO_PAGE, dtype=torch.int32)
        chunks = [shape.attention_chunk_size if i in shape.chunked_layers else 0 for i in range(shape.num_layers)]
        self.paged = [PagedLayer(pool, chunk, table) for chunk, table in zip(chunks, self.tables, strict=True)]
        self._chunks = set(chunks) - {0}
        super().__init__(self.paged, pool.context)

    def crosses(self, tokens: int) -> bool:
        """Whether ``tokens`` more let a chunked layer forget the chunk that it is in."""
        seen = self.paged[0].seen
        return any((seen + tokens) // chunk > seen // chunk for chunk in self._chunks)

    def reserve(self, tokens: int) -> None:
        """Have pages in every layer for ``tokens`` more, all within one chunk.

        Raises BudgetError if the planned context is exceeded, OutOfPages if there are no more pages: then those that
        were had so far stay with the sequence.
        """
        seen = self.get_seq_length()
        if tokens == 1 and seen % KV_PAGE_TOKENS and self._written == seen:
            self.paged[0].check(1)  # the page of the token before is there and is this sequence's own
            return
        for layer in self.paged:
            layer.reserve(tokens)

    def advance(self, tokens: int) -> None:
        """``tokens`` more, within one chunk, have been appended in every layer."""
        for layer in self.paged:
            layer.advance(tokens)
        self._written = self.paged[0].seen

    @property
    def read_nbytes(self) -> int:
        """See SequenceCache."""
        return self.pool.token_nbytes * sum([layer.seen - layer.start for layer in self.paged])

    def fork(self, length: int) -> "PagedCache | None":
        """A new sequence that begins with the first ``length`` tokens of this one; None if a chunked layer has
        forgotten some of them."""
        if length > self.get_seq_length() or any(length < layer.start for layer in self.paged):
            return None
        other = PagedCache(self.pool)
        try:
            for mine, theirs in zip(self.paged, other.paged, strict=True):
                mine.share_with(theirs, length)
        except ColdstreamError:  # what is needed of it in memory is on disk, and cannot be had
            other.free()
            return None
        self.is_shared()
        return other

    def stretches(self, windows: Sequence[int]) -> list[list[Stretch]]:
        """Of each layer those on disk that the next token looks at, which sees the last ``windows`` tokens (0: all)."""
        found = []
        for layer, window in zip(self.paged, windows, strict=True):
            first = max(0, layer.seen - window + 1) if window else 0
            found.append(layer.on_disk[first // (KV_PAGE_TOKENS * layer._stretch) :])
        return found

    def is_shared(self) -> None:
        """What was its own is shared from now on."""
        self._written = -1

    def make_places(self, length: int) -> list[tuple[int, int, int]]:
        """Have pages for the first ``length`` tokens, as far as attention looks at them: layer, block and page of each
        whose contents are to be put there. Until ``filled`` says that they are, the cache has no tokens.

        Raises OutOfPages; then it is to be freed.
        """
        places = [(i, block, page) for i, layer in enumerate(self.paged) for block, page in layer.make_places(length)]
        self.filled(0)
        return places

    def filled(self, length: int) -> None:
        """The pages of the first ``length`` tokens are there."""
        self._written = -1
        for layer in self.paged:
            layer.seen, layer.start = length, layer.chunk_at(length)

    def rewind(self, length: int) -> int:
        """See SequenceCache."""
        self._written = -1
        return super().rewind(length)

    def pages_to_come(self, tokens: int) -> int:
        """Free pages that it takes until this sequence holds ``tokens``: a shared page is copied before it is gone on
        in."""
        last, shared = self.get_seq_length() // KV_PAGE_TOKENS, self.pool.counts.shared
        copies = 0
        if last < self.tables.shape[1]:
            copies = sum(shared(page) for page in self.tables[:, last].tolist() if page >= 0)
        return self.pool.pages_of(tokens) - self.page_count + copies

    @property
    def page_count(self) -> int:
        """Pages that hold some of it, shared ones too."""
        return int((self.tables >= 0).sum())

    def free(self) -> None:
        """Give every page back: the sequence is over."""
        self.reset()  # type: ignore[no-untyped-call]
