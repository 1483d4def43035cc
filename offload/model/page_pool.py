"""PagePool: the pages of a KV cache, in memory, and what sequences have of them.

Legend: h KV heads, T tokens, d head_dim, P pages.
"""

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import torch

from offload.batch.kv_tiers import KvTiers
from offload.batch.pages import PageCounts
from offload.experts.storage.arena import Arena
from offload.model.disk_pages import DiskPages
from offload.model.key_bounds import KeyBounds, range_width
from offload.model.kv_cache import Storage
from offload.prompts.page_file import BlockPages
from quant.errors import UsageError
from quant.kernels.attention import KvPages
from quant.kernels.stack import MAX_ROWS
from quant.model.shape import ModelShape
from quant.sizes import KV_PAGE_TOKENS


class PagePool:
    """Pages for all layers and sequences of a model of ``shape``: as many as ``sequences`` of ``context`` tokens take,
    or with ``tiers`` as many as these say, and the others in a file in ``folder``. ``plain`` is the dtype of plain
    storage. With an ``epsilon`` decode steps leave out pages, see KeyBounds. Raises OutputError if there can be no such
    file."""

    def __init__(
        self,
        shape: ModelShape,
        context: int,
        storage: Storage,
        device: torch.device,
        plain: torch.dtype,
        sequences: int = 1,
        tiers: KvTiers | None = None,
        folder: Path = Path(),
        epsilon: float = 0.0,
    ) -> None:
        self.shape, self.context, self.sequences, self._device = shape, context, sequences, device
        self.dtype = {"bf16": torch.bfloat16, "int8": torch.int8, "plain": plain}[storage]
        self.counts = PageCounts(sequences * shape.kv_pages(context) if tiers is None else tiers.pages)
        self.disk: DiskPages | None = None
        self.epsilon = epsilon
        self.bounds: KeyBounds | None = None
        if tiers is not None:
            self.disk = DiskPages(tiers, folder, *self.page_nbytes, self.block_pages, lambda: self.memory)
            self.counts.forget = self.disk.spill

    @cached_property
    def pages(self) -> KvPages:
        """Keys and values ``[P, h, 128, d]``, made on first use."""
        shape, device = self.shape, str(self._device)
        size = (self.all_pages, shape.num_kv_heads, shape.head_dim)
        if device != "cpu":
            return KvPages.allocate(*size, self.dtype, device)
        # In huge pages, which the disk writes into at its full rate.
        pages = KvPages.allocate(
            *size, self.dtype, memory=lambda nbytes: Arena(1, nbytes).slot(0), native=shape.is_native
        )
        if self.disk is not None:
            pages.bring_by(self.disk.bring)
        if self.epsilon:
            self.bounds = KeyBounds(self.epsilon, pages)
            self.counts.taken = self.bounds.forget
            if self.disk is not None:
                self.disk.bound_by(self.bounds)
        return pages

    @property
    def all_pages(self) -> int:
        """Pages in memory, those among them through which others come from disk."""
        return self.counts.count if self.disk is None else self.disk.end

    @property
    def page_nbytes(self) -> tuple[int, int]:
        """Bytes of a page of keys or of values, and of its scales."""
        rows = self.shape.num_kv_heads * KV_PAGE_TOKENS
        return rows * self.shape.head_dim * self.dtype.itemsize, rows * 4 if self.dtype == torch.int8 else 0

    def block_pages(self, pages: Iterable[int]) -> BlockPages:
        """The memory of ``pages``, on a CPU."""
        keys, values, *scales = self.memory
        page, scale = self.page_nbytes
        found = [part[i * page : (i + 1) * page] for i in pages for part in (keys, values)]
        return BlockPages(found, [part[i * scale : (i + 1) * scale] for i in pages for part in scales])

    @cached_property
    def memory(self) -> list[memoryview]:
        pages = self.pages
        tensors = (pages.keys, pages.values, pages.key_scale, pages.value_scale)
        return [memoryview(t.view(-1).view(torch.uint8).numpy()) for t in tensors if t is not None]  # type: ignore[arg-type]

    def pages_of(self, tokens: int) -> int:
        """Pages in memory that ``tokens`` of a sequence take."""
        pages = self.shape.kv_pages(tokens)
        return pages if self.disk is None else min(pages, self.disk.tiers.least_pages(self.shape, tokens))

    @property
    def most_sequences(self) -> int:
        """How many sequences may run at once: with pages on disk one, that all of the disk's rate goes to."""
        return MAX_ROWS if self.disk is None else 1

    @property
    def notes(self) -> list[str]:
        """What a user should know of the disk."""
        return [] if self.disk is None else self.disk.file.notes

    def check_reader(self, able: bool) -> None:
        """Raise UsageError if pages may be on disk, or are left out, and who computes attention is not ``able`` to do
        that."""
        asked = "--kv-disk" if self.disk is not None else "--kv-epsilon" if self.epsilon else ""
        if asked and not able:
            raise UsageError(
                f"{asked} is for models that the native kernels compute as a whole: this one's config or its experts' "
                "format asks for transformers' modules; leave it out"
            )

    def spill(self) -> bool:
        """Make room by putting pages on disk; False if none can be."""
        return self.disk is not None and self.disk.spill()

    @property
    def disk_nbytes(self) -> dict[str, int]:
        """By role, what is on disk now."""
        return {} if self.disk is None else {"kv_cache": self.disk.file.used_nbytes}

    def take_read_nbytes(self) -> int:
        """Bytes of pages that were read from disk since the last call."""
        return 0 if self.disk is None else self.disk.take_read_nbytes()

    def take_left_out_nbytes(self) -> int:
        """Bytes of keys and values that steps since the last call left out, less what the bounds took."""
        return 0 if self.bounds is None else self.bounds.take_left_out_nbytes()

    def close(self) -> None:
        """Give disk space back."""
        if self.disk is not None:
            self.disk.close()

    @property
    def token_nbytes(self) -> int:
        """Bytes that a token takes in one layer."""
        scale = 4 if self.dtype == torch.int8 else 0
        return 2 * self.shape.num_kv_heads * (self.shape.head_dim * self.dtype.itemsize + scale)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages, used or not; of what transformers' own attention keeps where that is what runs."""
        if not self.shape.keeps_pages:
            return self.shape.kv_nbytes(self.context, self.dtype.itemsize)
        return self.all_pages * KV_PAGE_TOKENS * self.token_nbytes + self._bounds_nbytes(self.all_pages)

    @property
    def reached_nbytes(self) -> int:
        """Bytes of pages that tokens have reached: the others take no memory on a CPU."""
        if not self.shape.keeps_pages or self._device.type != "cpu":
            return self.nbytes
        staged = 0 if self.disk is None else self.disk.reached
        pages = self.counts.reached + staged
        return pages * KV_PAGE_TOKENS * self.token_nbytes + self._bounds_nbytes(pages)

    def _bounds_nbytes(self, pages: int) -> int:
        """Bytes of what bounds the keys of ``pages`` in memory, and of those on disk."""
        if not self.epsilon:
            return 0
        on_disk = 0 if self.disk is None else self.disk.used_pages
        return (pages + on_disk) * self.shape.num_kv_heads * 4 * range_width(self.shape.head_dim)

    def own(self, page: int) -> int:
        """A page like ``page`` that one sequence uses alone and writes to: itself, or a copy. Raises OutOfPages."""
        if not self.counts.shared(page):
            self.counts.taken(page)
            return page
        copy = self.counts.take()
        pages = self.pages
        for tensor in (pages.keys, pages.values, pages.key_scale, pages.value_scale):
            if tensor is not None:
                tensor[copy] = tensor[page]
        self.counts.give_back(page)
        return copy
