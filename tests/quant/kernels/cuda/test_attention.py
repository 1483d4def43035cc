"""Attention over kept tokens equals the reference at any length, and reads nothing beyond it."""

import pytest
import torch

from quant.errors import SchemeError
from quant.kernels.cuda import attention
from quant.kernels.cuda.attention import AttentionScratch, KvRows
from tests.quant.kernels.cuda.images import assert_near


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "capacity", "position", "chunk", "int8"),
    [
        (10, 2, 64, 300, 299, 0, False),
        (10, 2, 64, 300, 0, 0, True),
        (4, 4, 24, 512, 200, 128, True),
        (8, 1, 128, 200, 130, 0, False),
        (6, 2, 96, 64, 63, 0, True),
        (5, 1, 32, 128, 128, 128, False),
    ],
)
def test_equals_the_reference(
    heads: int, kv_heads: int, width: int, capacity: int, position: int, chunk: int, int8: bool, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(position)
    query = torch.randn(heads, width, generator=generator).bfloat16()
    states = torch.randn(2, kv_heads, capacity, width, generator=generator) * 2
    row = position % chunk if chunk else position
    scales: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    if int8:
        scale = states.abs().amax(-1, keepdim=True) / 127
        states = (states / scale).round().to(torch.int8)
        scale[:, :, row + 1 :] = float("nan")  # what no token has reached
        scales = (scale[0], scale[1])
    else:
        states = states.bfloat16()
        states[:, :, row + 1 :] = float("nan")
    results = []
    for place in (device, torch.device("cpu")):
        scratch = AttentionScratch.allocate(heads, width, capacity, place)
        scratch.sums.fill_(float("nan"))
        out = torch.empty(heads, width, device=place)
        run = attention.attention_reference if results else attention.launch_attention
        rows = KvRows(*(None if t is None else t.to(place) for t in (*states, *scales)))  # type: ignore[arg-type]
        run(query.to(place), rows, torch.tensor([position], device=place), chunk, width**-0.5, scratch, out)
        results.append(out)
    assert_near(*results, 1e-5 if device.type == "cpu" else 1e-2)


def test_the_query_keeps_its_dtype_and_may_have_more_dimensions() -> None:
    keys, values = torch.randn(2, 2, 16, 32)
    scratch = AttentionScratch.allocate(4, 32, 16, torch.device("cpu"))
    query = torch.randn(1, 4, 1, 32)
    out = attention.decode_attention(query, KvRows(keys, values), torch.tensor([9]), 0, 0.1, scratch)
    stock = torch.nn.functional.scaled_dot_product_attention(
        query, keys[None, :, :10], values[None, :, :10], scale=0.1, enable_gqa=True
    )
    torch.testing.assert_close(out, stock.view(4, 32))


def test_scratch_grows_with_the_capacity_up_to_64_parts() -> None:
    parts = [
        AttentionScratch.allocate(1, 8, capacity, torch.device("cpu")).sums.shape[1]
        for capacity in (1, 128, 129, 8192, 1 << 20)
    ]
    assert parts == [1, 1, 2, 64, 64]


def test_what_does_not_fit_is_refused() -> None:
    scratch = AttentionScratch.allocate(4, 32, 16, torch.device("cpu"))
    keys, position = torch.zeros(3, 16, 32), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(SchemeError, match="4 heads of 32"):
        attention.decode_attention(torch.zeros(4, 32), KvRows(keys, keys), position, 0, 1.0, scratch)
