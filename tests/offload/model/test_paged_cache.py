"""Pages hold what attention may see and no more, are shared, and are copied before one of two writes."""

from dataclasses import replace

import pytest
import torch

from offload.batch.pages import OutOfPages
from offload.model.kv_cache import KVCache, Storage
from offload.model.page_pool import PagePool
from offload.model.paged_cache import NO_PAGE, PagedCache
from quant.errors import BudgetError
from quant.model.known_shapes import load_shape
from quant.model.shape import ModelShape

SHAPE = replace(ModelShape.from_config(load_shape("mini-scout")), num_layers=4, attention_chunk_size=200)
FULL = next(layer for layer in range(4) if layer not in SHAPE.chunked_layers)


def pool_of(context: int = 1000, storage: Storage = "plain") -> PagePool:
    return PagePool(SHAPE, context, storage, torch.device("cpu"), torch.float32)


def states(start: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(1, SHAPE.num_kv_heads, 1000, SHAPE.head_dim, generator=generator)
    return whole[:, :, start : start + count]


@pytest.mark.parametrize("storage", ["plain", "bf16", "int8"])
@pytest.mark.parametrize("steps", [[1] * 30, [150, 1, 48, 1, 1, 90], [200, 200, 5], [450], [130, 70, 1, 300]])
def test_keys_and_values_are_those_of_a_cache_in_one_piece(steps: list[int], storage: Storage) -> None:
    pool, whole, seen = pool_of(storage=storage), KVCache(SHAPE, 1000, storage), 0
    cache = PagedCache(pool)
    for count in steps:
        for layer in range(4):
            given = states(seen, count)
            assert cache.kept[layer].get_mask_sizes(count) == whole.kept[layer].get_mask_sizes(count)
            found, expected = cache.update(given, -given, layer), whole.update(given, -given, layer)
            assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
        seen += count
    assert cache.read_nbytes == whole.read_nbytes
    cache.free()
    assert pool.counts.free == pool.counts.count


@pytest.mark.parametrize(("storage", "most"), [("plain", 0.0), ("int8", 0.03)])
def test_a_latent_and_what_is_rotated_beside_it_share_pages(storage: Storage, most: float) -> None:
    """As transformers' modules give and take them, where those compute attention."""
    shape = replace(SHAPE, num_kv_heads=1, head_dim=72, latent=128, chunked_layers=(), attention_chunk_size=0)
    pool = PagePool(shape, 400, storage, torch.device("cpu"), torch.float32)
    cache, generator = PagedCache(pool), torch.Generator().manual_seed(1)
    latents, rotated = (torch.randn(1, 1, 300, width, generator=generator) for width in (128, 16))
    for first, last in ((0, 200), (200, 201), (201, 300)):
        found = cache.update(latents[:, :, first:last], rotated[:, :, first:last], 1)
        for one, whole in zip(found, (latents, rotated), strict=True):
            assert one.shape == whole[:, :, :last].shape
            assert (one - whole[:, :, :last]).abs().max() <= most
    assert pool.token_nbytes == (144 * 4 if storage == "plain" else 144 + 8)


def test_only_pages_that_tokens_have_reached_are_taken_and_a_chunk_that_is_over_is_given_back() -> None:
    pool = pool_of()
    cache = PagedCache(pool)
    for layer in range(4):
        cache.update(states(0, 390), states(0, 390), layer)
    chunked = SHAPE.chunked_layers[0]
    assert (cache.tables[FULL] != NO_PAGE).tolist() == [True] * 4 + [False] * 4
    assert (cache.tables[chunked] != NO_PAGE).tolist() == [False, True, True, True] + [False] * 4
    for layer in range(4):
        cache.update(states(390, 12), states(390, 12), layer)
    assert (cache.tables[chunked] != NO_PAGE).tolist() == [False] * 3 + [True] + [False] * 4
    assert cache.rewind(300) == 0 and pool.counts.free == pool.counts.count


def test_a_fork_shares_pages_until_one_of_the_two_writes() -> None:
    pool = pool_of()
    first = PagedCache(pool)
    for layer in range(4):
        first.update(states(0, 150), states(0, 150), layer)
    taken = pool.counts.count - pool.counts.free
    second = first.fork(140)
    assert second is not None and second.get_seq_length() == 140
    assert pool.counts.count - pool.counts.free == taken, "nothing is copied before it must be"
    for layer in range(4):
        other = -states(140, 3)
        keys, _ = second.update(other, other, layer)
        assert torch.equal(keys, torch.cat((states(0, 140), other), 2))
        keys, _ = first.update(states(150, 2), states(150, 2), layer)
        assert torch.equal(keys, states(0, 152))
    assert pool.counts.count - pool.counts.free == taken + 4, "one page of each layer"
    first.free()
    assert pool.counts.count - pool.counts.free == taken
    second.free()
    assert pool.counts.free == pool.counts.count


def test_a_fork_before_a_chunk_that_is_gone_is_none() -> None:
    cache = PagedCache(pool_of())
    for layer in range(4):
        cache.update(states(0, 250), states(0, 250), layer)
    assert cache.fork(150) is None and cache.fork(251) is None
    assert cache.fork(230) is not None


def test_what_does_not_fit_is_refused_and_leaves_the_pages_that_were_there() -> None:
    pool = pool_of(context=256)
    one, two = PagedCache(pool), PagedCache(pool)
    one.reserve(200)
    one.advance(200)
    with pytest.raises(BudgetError, match="planned for 256 tokens"):
        one.reserve(57)
    with pytest.raises(OutOfPages, match="pages of the KV cache are in use"):
        two.reserve(129)
    two.free()
    one.free()
    assert pool.counts.free == pool.counts.count
