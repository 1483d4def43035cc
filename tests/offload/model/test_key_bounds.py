"""Pages of the KV cache that are left out weigh no more than was allowed, whatever keys and queries are."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from offload.model.key_bounds import KeyBounds
from quant.kernels import native
from quant.kernels.attention import Attention, AttentionShape, KvPages
from quant.kernels.moe import GatedMlp
from quant.kernels.stack import DenseBlock, Segment, Stack
from quant.kernels.weight import Weight

PAGE, HEADS, KV, D = 128, 4, 2, 64
HIDDEN, BLOCKS = HEADS * D, 24  # pages before the new token's
Keys = Callable[[torch.Generator], Tensor]


def plain(matrix: Tensor) -> Weight:
    return Weight.from_tensors("f32", matrix)


def layer(scaling: float) -> Stack:
    """Attention that gives what each head makes of its queries, which are x, and nothing else. What a new token is
    itself, nobody looks for."""
    shape = AttentionShape(HEADS, KV, D, scaling=scaling)
    eye, none = plain(torch.eye(HIDDEN)), plain(torch.zeros(KV * D, HIDDEN))
    mlp = GatedMlp(plain(torch.zeros(8, HIDDEN)), plain(torch.zeros(8, HIDDEN)), plain(torch.zeros(HIDDEN, 8)))
    return Stack([Attention(shape, eye, none, none, eye)], [DenseBlock(mlp, torch.ones(HIDDEN), 1e-5)], 0)


def random_keys(generator: torch.Generator) -> Tensor:
    return torch.randn(BLOCKS * PAGE, KV, D, generator=generator)


def needle(generator: torch.Generator) -> Tensor:
    """One key in the seventh page is what is asked for; the others are small."""
    keys = 0.05 * random_keys(generator)
    keys[6 * PAGE + 77] = 1.0
    return keys


def corners(generator: torch.Generator) -> Tensor:
    """In every page each channel has both ends of its range, never two channels in one key: bounds are as wrong as they
    can be."""
    keys = torch.zeros(BLOCKS, PAGE, KV, D)
    for channel in range(D):
        keys[:, channel, :, channel], keys[:, channel + D, :, channel] = 3.0, -3.0
    return keys.view(-1, KV, D)


def tight(generator: torch.Generator) -> Tensor:
    """All keys of a page are one: the bounds are their scores, and whole pages weigh what they say."""
    return torch.randn(BLOCKS, 1, KV, D, generator=generator).expand(-1, PAGE, -1, -1).reshape(-1, KV, D)


def far(generator: torch.Generator) -> Tensor:
    """Of every size, and some pages of zeros."""
    size = torch.logspace(-20, 3, BLOCKS).repeat_interleave(PAGE)[:, None, None]
    size[3 * PAGE : 6 * PAGE] = 0
    return random_keys(generator) * size


def filled(dtype: torch.dtype, keys: Tensor, seed: int) -> tuple[KvPages, Tensor, Tensor]:
    """Pages of ``keys`` in any order, the table of them, and their values as they are stored."""
    generator = torch.Generator().manual_seed(seed)
    pages = KvPages.allocate(BLOCKS + 3, KV, D, dtype)
    table = torch.randperm(BLOCKS + 3, generator=generator)[: BLOCKS + 1].int()
    place = torch.arange(BLOCKS * PAGE)
    page, row = table[place // PAGE].long(), place % PAGE
    stored = []
    values = torch.randn(keys.shape, generator=generator)
    for states, scales in ((keys, pages.key_scale), (values, pages.value_scale)):
        if scales is not None:
            scale = states.abs().amax(-1).clamp_min(1e-12) / 127
            scales[page, :, row] = scale
            states = (states / scale[..., None]).round()
        stored.append(states)
    pages.write(page, row, *stored)
    read = pages.read(page, row)[1].float()
    return pages, table, read if pages.value_scale is None else read * pages.value_scale[page, :, row][..., None]


def step(stack: Stack, x: Tensor, pages: KvPages, table: Tensor, position: int, exact: bool) -> Tensor:
    out, none = x.clone(), torch.empty(len(x), 0)
    stack.begin(out, [Segment(table[None], position, len(x))], pages, none, none, exact)
    assert stack.go() is None
    return out


def queries(scale: float, seed: int, tokens: int = 1) -> Tensor:
    """What a needle answers to, and some noise."""
    return scale * (1 + 0.1 * torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("keys", [random_keys, needle, corners, tight, far])
def test_an_output_is_off_by_no_more_than_twice_epsilon_times_the_largest_value(
    keys: Keys, dtype: torch.dtype, exact: bool
) -> None:
    left_out = 0
    for seed, scale in enumerate((0.01, 0.3, 1.0, 3.0)):
        pages, table, values = filled(dtype, keys(torch.Generator().manual_seed(seed)), seed)
        stack, x = layer(1.0), queries(scale, seed)
        expected = step(stack, x, pages, table, BLOCKS * PAGE, exact)
        for epsilon in (1e-6, 1e-3, 0.1):
            bounds = KeyBounds(epsilon, pages)
            found = step(stack, x, pages, table, BLOCKS * PAGE, exact)
            pages.native.bounds = None
            said = bounds.left_out
            assert said.pages == KV * (BLOCKS + 1) and said.greatest_share <= epsilon
            rounding = 2e-6 if exact else 2e-2 * (dtype == torch.bfloat16) + 1e-4
            allowed = (2 * said.greatest_share + rounding) * values.abs().max()
            assert (found - expected).abs().max() <= allowed, (scale, epsilon, said)
            left_out += said.left_out
    assert (left_out > 0) == (keys not in (random_keys, corners)), "ranges of keys without any order prove nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_ranges_hold_every_key_and_are_no_wider_than_their_rounding(dtype: torch.dtype) -> None:
    for make in (random_keys, far):
        pages, table, _ = filled(dtype, make(torch.Generator().manual_seed(1)), 1)
        place = torch.arange(BLOCKS * PAGE)
        page, row = table[place // PAGE].long(), place % PAGE
        keys = pages.read(page, row)[0].double()
        if pages.key_scale is not None:
            keys = (keys.float() * pages.key_scale[page, :, row][..., None]).double()
        found = KeyBounds(1e-3, pages).of(table[:BLOCKS].tolist())[..., :D].double()  # [P, h, 2, d]
        pages.native.bounds = None
        low, high = (getattr(keys.view(BLOCKS, PAGE, KV, D), name)(1) for name in ("amin", "amax"))
        assert (found[:, :, 0] <= low).all() and (found[:, :, 1] >= high).all()
        assert (low - found[:, :, 0] <= low.abs() / 128).all() and (found[:, :, 1] - high <= high.abs() / 128).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_a_token_is_the_same_to_the_bit_on_every_number_of_threads_and_beside_others(dtype: torch.dtype) -> None:
    keys = needle(torch.Generator().manual_seed(3))
    pages, table, _ = filled(dtype, keys, 3)
    bounds, stack, x = KeyBounds(1e-3, pages), layer(1.0), queries(1.0, 3, tokens=6)
    found, threads = [], native.threads()
    for together, count in ((1, 1), (1, 2), (6, 2), (3, 1)):
        native.set_threads(count)
        parts = range(0, 6, together)
        found.append([step(stack, x[i : i + together], pages, table, BLOCKS * PAGE + i, False) for i in parts])
    native.set_threads(threads)
    first = torch.cat(found[0])
    assert all(torch.equal(torch.cat(other), first) for other in found[1:])
    assert 0 < bounds.left_out.left_out < bounds.left_out.pages


@pytest.mark.parametrize("poison", ["query", "key", "value"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_what_is_not_finite_is_never_left_out(dtype: torch.dtype, poison: str) -> None:
    pages, table, _ = filled(dtype, needle(torch.Generator().manual_seed(4)), 4)
    x, page = queries(1.0, 4), int(table[11])
    if poison == "query":
        x[0, D + 3] = float("nan")
    elif dtype == torch.int8:
        scale = pages.key_scale if poison == "key" else pages.value_scale
        assert scale is not None
        scale[page, :, 5] = float("nan")
    else:
        (pages.keys if poison == "key" else pages.values)[page, :, 5, 3] = float("nan")
    bounds = KeyBounds(1e-3, pages)
    assert step(layer(1.0), x, pages, table, BLOCKS * PAGE, False).isnan().any()
    assert poison != "value" or bounds.left_out.left_out > 0, "other pages are"


def test_a_page_that_is_written_anew_is_bounded_anew() -> None:
    stack, x = layer(1.0), queries(1.0, 5)
    pages, table, _ = filled(torch.float32, 0.05 * random_keys(torch.Generator().manual_seed(5)), 5)
    bounds = KeyBounds(1e-3, pages)
    step(stack, x, pages, table, BLOCKS * PAGE, True)
    page = int(table[6])
    pages.keys[page, :, 9] = 1.0
    bounds.forget(page)
    found = step(stack, x, pages, table, BLOCKS * PAGE, True)
    pages.native.bounds = None
    assert (found - step(stack, x, pages, table, BLOCKS * PAGE, True)).abs().max() < 1e-2
