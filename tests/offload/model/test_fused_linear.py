"""Linears joined to one give the same product, and hold their weights once."""

import pytest
import torch
from torch import nn

from offload.model.fused_linear import add_product, join, routers_with_next
from quant.linear import Compute, QuantLinear
from quant.pack import quantize_absmax
from quant.scheme import Scheme


def made(rows: int, scheme: Scheme, *, bias: bool = False, features: int = 128) -> QuantLinear:
    generator = torch.Generator().manual_seed(rows)
    linear = QuantLinear(rows, features, scheme, Compute(), bias=bias)
    weight = torch.randn(rows, features, generator=generator)
    if scheme.is_packed:
        packed = quantize_absmax(weight, scheme)
        linear.weight_packed.data, linear.weight_scale.data = packed.packed, packed.scale
    else:
        linear.weight.data = weight.bfloat16()
    if linear.bias is not None:
        linear.bias.data = torch.randn(rows, generator=generator)
    return linear


@pytest.mark.parametrize("scheme", [Scheme("int8", 64), Scheme("int4"), Scheme("bf16")], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_the_rows_of_the_joined_product_are_those_of_its_parts(scheme: Scheme, bias: bool) -> None:
    parts = [made(rows, scheme, bias=bias) for rows in (96, 32, 16)]
    x = torch.randn(1, 128)
    expected = torch.cat([part(x) for part in parts], -1)
    joined = join(parts)
    assert joined is not None
    assert torch.equal(joined(x), expected)
    assert torch.equal(torch.cat([part(x) for part in parts], -1), expected)
    held = {p.untyped_storage().data_ptr() for linear in (joined, *parts) for p in linear.parameters()}
    assert len(held) == len(list(joined.parameters()))


def test_what_is_stored_otherwise_is_not_joined() -> None:
    assert join([made(32, Scheme("int8")), made(32, Scheme("int4"))]) is None
    assert join([made(32, Scheme("int8")), made(16, Scheme("int8"), bias=True)]) is None
    assert join([made(32, Scheme("int8")), nn.Linear(128, 16)]) is None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scheme", [Scheme("int8"), Scheme("bf16")], ids=str)
def test_a_product_is_added_to_what_is_there(scheme: Scheme, bias: bool) -> None:
    linear, x, out = made(48, scheme, bias=bias), torch.randn(1, 128), torch.randn(1, 48)
    expected = out + linear(x)
    add_product(linear, x, out)
    assert torch.allclose(out, expected, atol=1e-5)


def test_a_router_and_the_next_ones_give_both_choices_from_one_input() -> None:
    generator = torch.Generator().manual_seed(2)
    routers = [torch.randn(16, 64, generator=generator) for _ in range(3)]
    norms = [torch.rand(64, generator=generator) + 0.1 for _ in range(3)]
    norms[0][5] = 0.0  # a channel that is gone tells nothing
    pairs, cpu = list(zip(routers, norms, strict=True)), torch.device("cpu")
    stacked = routers_with_next(pairs, True, cpu)
    assert [len(rows) for rows in stacked] == [32, 32, 16]
    plain = routers_with_next(pairs, False, cpu)
    assert all(torch.equal(rows, router) for rows, router in zip(plain, routers, strict=True))
    residual = torch.randn(1, 64, generator=generator)
    residual[0, 5] = 0.0
    for row, rows in enumerate(stacked):
        both = (residual * norms[row]) @ rows.T
        assert torch.equal(both[:, :16], (residual * norms[row]) @ routers[row].T)
        if row < 2:
            ahead = (residual * norms[row + 1]) @ routers[row + 1].T
            assert torch.allclose(both[:, 16:], ahead, atol=1e-4)
