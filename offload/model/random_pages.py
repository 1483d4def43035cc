"""A KV cache filled with random keys and values, to measure what comes after a long text without computing it.

What attention does with them takes as long as with a text's own: every page is read, every score is made. Only what the
model then says means nothing.
"""

import torch

from offload.model.page_pool import PagePool
from offload.model.paged_cache import PagedCache
from quant.kernels.attention import KvPages
from quant.sizes import KV_PAGE_TOKENS

_PATTERNS = (
    31  # pages that are made; the others are copies, which are not quicker to read: all are longer than any cache
)
_SCALE = 3.0 / 127  # of int8: three standard deviations are the largest


@torch.inference_mode()  # as pages are written
def random_sequence(pool: PagePool, tokens: int, seed: int = 0) -> PagedCache:
    """A sequence of ``tokens`` in pages of ``pool``, on a CPU. Raises OutOfPages."""
    cache, patterns = PagedCache(pool), _patterns(pool, seed)
    step = tokens if pool.disk is None else pool.disk.tiers.recent  # what is on disk has to pass through memory
    try:
        for length in range(step, tokens + step, step):
            for layer, block, page in cache.make_places(min(length, tokens)):
                for to, made in zip(_tensors(pool.pages), _tensors(patterns), strict=True):
                    to[page] = made[(layer + block) % _PATTERNS]
            cache.filled(min(length, tokens))
    except BaseException:
        cache.free()
        raise
    return cache


def _tensors(pages: KvPages) -> list[torch.Tensor]:
    return [t for t in (pages.keys, pages.values, pages.key_scale, pages.value_scale) if t is not None]


def _patterns(pool: PagePool, seed: int) -> KvPages:
    """Keys and values of a normal distribution, such that scores are neither all alike nor all of one key."""
    generator = torch.Generator().manual_seed(seed)
    made = KvPages.allocate(_PATTERNS, pool.shape.num_kv_heads, pool.shape.head_dim, pool.dtype)
    place = torch.arange(_PATTERNS * KV_PAGE_TOKENS)
    states = [torch.randn(len(place), *made.keys.shape[1::2], generator=generator) for _ in range(2)]
    if pool.dtype == torch.int8:
        states = [(state / _SCALE).round().clamp(-127, 127) for state in states]
    made.write(place // KV_PAGE_TOKENS, place % KV_PAGE_TOKENS, *states)
    for scale in (made.key_scale, made.value_scale):
        if scale is not None:
            scale.fill_(_SCALE)
    return made
