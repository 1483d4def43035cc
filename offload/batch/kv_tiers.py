"""KvTiers: which part of a KV cache is in RAM and which on disk, counted in pages. Pure Python.

Layers that attend to everything keep what is recent in RAM; what is older goes to disk in stretches, so many pages of
one layer that follow one another, and is read back for every step. A step asks for stretches in an order that is known
before it begins, so that they are read ahead into a ring of staging places.
"""

from dataclasses import dataclass

from quant.model.shape import ModelShape
from quant.sizes import KV_PAGE_TOKENS

STRETCH_PAGES = 16  # 2 to 8 MiB of most models: what keeps a disk busy in one read
STAGED = 16  # stretches: what the disk reads while layers compute that read none of it


@dataclass(frozen=True)
class KvTiers:
    """``pages`` may be in RAM beside the ring of ``staged`` stretches of ``stretch`` pages each (a multiple of 4: runs
    of keys are not cut). The ``recent`` tokens of a sequence stay there."""

    pages: int
    recent: int
    stretch: int = STRETCH_PAGES
    staged: int = STAGED

    @property
    def stretch_tokens(self) -> int:
        """Tokens of a stretch."""
        return self.stretch * KV_PAGE_TOKENS

    @property
    def memory_pages(self) -> int:
        """Pages in RAM, the ring's among them."""
        return self.pages + self.staging_pages

    @property
    def staging_pages(self) -> int:
        """Pages of the ring."""
        return self.staged * self.stretch

    def least_pages(self, shape: ModelShape, context: int) -> int:
        """Pages without which one sequence of ``context`` tokens cannot go on: chunks as they are, and of each layer
        that attends to everything what is recent, as much again that comes, a stretch that is not whole, and a page."""
        full = shape.num_layers - len(shape.chunked_layers)
        beyond = max(0, context - 2 * self.recent - self.stretch_tokens - KV_PAGE_TOKENS)
        return shape.kv_pages(context) - full * (beyond // KV_PAGE_TOKENS)
