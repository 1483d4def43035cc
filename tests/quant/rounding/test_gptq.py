"""GPTQ gives less error in the product than plain rounding, in the same format, and survives bad Hessians."""

import pytest
import torch
from torch import Tensor

from quant.errors import CheckpointError
from quant.pack import dequantize, quantize_absmax
from quant.rounding.gptq import DAMPING, Rounded, gptq
from quant.scheme import Scheme

N, K = 48, 256


def correlated(tokens: int = 2000, seed: int = 0) -> Tensor:
    """Inputs whose channels go together and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(K // 4, K, generator=generator)
    noise = 0.3 * torch.randn(tokens, K, generator=generator)
    return (torch.randn(tokens, K // 4, generator=generator) @ mix / 8 + noise) * torch.linspace(0.2, 2, K)


def weight() -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(1))


def product_error(rounded: Rounded, x: Tensor) -> float:
    return float((x @ (dequantize(rounded.packed) - weight()).t()).square().mean())


@pytest.mark.parametrize("text", ["int2-g32", "int3-g64", "int4-g128", "int4-g32", "int8-g128"])
def test_the_product_is_kept_better_than_by_rounding_to_nearest(text: str) -> None:
    x, scheme = correlated(), Scheme.parse(text)
    nearest = dequantize(quantize_absmax(weight(), scheme))
    plain = float((x @ (nearest - weight()).t()).square().mean())
    rounded = gptq(weight(), scheme, x.t() @ x / len(x))
    assert product_error(rounded, x) < 0.5 * plain
    assert rounded.packed.packed.shape == (N, K * scheme.bits // 32)
    assert rounded.packed.scale.shape == (N, K // scheme.group_size)
    assert rounded.damping == DAMPING


def test_a_weight_makes_up_for_what_its_inputs_lost() -> None:
    x = correlated()
    lost = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2)) * x.std(0)
    hessian, cross = lost.t() @ lost / len(x), x.t() @ lost / len(x)
    wanted = x @ weight().t()

    def error(rounded: Rounded) -> float:
        return float((lost @ dequantize(rounded.packed).t() - wanted).square().mean())

    scheme = Scheme("int8")
    assert error(gptq(weight(), scheme, hessian, cross)) < error(gptq(weight(), scheme, hessian))


def test_a_hessian_of_few_tokens_is_damped() -> None:
    x = correlated(tokens=3)
    assert torch.isfinite(dequantize(gptq(weight(), Scheme("int4"), x.t() @ x / 3).packed)).all()


def test_a_hessian_that_is_not_positive_definite_is_damped_more_and_says_so() -> None:
    x = correlated()
    hessian = x.t() @ x / len(x)
    hessian -= 0.2 * torch.diagonal(hessian).mean() * torch.eye(K)
    assert gptq(weight(), Scheme("int4"), hessian).damping > DAMPING


def test_inputs_that_are_always_zero_leave_rounding_by_weight_alone() -> None:
    rounded = gptq(weight(), Scheme("int4"), torch.zeros(K, K))
    relative = rounded.squared_error / rounded.squared_sum
    assert 0 < relative < 0.015


def test_a_hessian_with_nan_is_refused() -> None:
    with pytest.raises(CheckpointError, match="NaN or Inf"):
        gptq(weight(), Scheme("int4"), torch.full((K, K), torch.nan))
