"""Rounding with feedback: the kernel is the reference, and errors cancel along what inputs are like."""

import pytest
import torch
from torch import Tensor

from quant.errors import SchemeError
from quant.kernels import native
from quant.pack import dequantize, quantize_absmax
from quant.rounding.curvature import BLOCK, Curvature, round_by
from quant.rounding.feedback import round_with_feedback
from quant.scheme import Scheme


def inputs(columns: int, seed: int = 0) -> Tensor:
    """Samples ``[300, K]`` along a few directions, with a mean."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(12, columns, generator=generator)
    along = torch.randn(300, 12, generator=generator) @ directions
    return along + 0.3 * torch.randn(300, columns, generator=generator) + directions[0]


def curvature(columns: int, damping: float = 0.3) -> Curvature:
    found = Curvature.of(inputs(columns), damping)
    assert found is not None
    return found


def cost(x: Tensor, weight: Tensor, dense: Tensor) -> float:
    return float(((dense - weight) @ x.t()).square().sum())


@pytest.mark.parametrize("isa", ["avx512", "avx2", "neon", "portable"])
@pytest.mark.parametrize(
    ("scheme", "rows", "columns"),
    [("int8", 70, 384), ("int4", 33, 128), ("int8-g32", 1, 96), ("int4-g32", 130, 640), ("int8", 64, 2 * BLOCK)],
)
def test_the_kernel_rounds_as_the_reference_does(isa: str, scheme: str, rows: int, columns: int) -> None:
    if isa not in native.isas():
        pytest.skip(f"this processor does not run {isa}")
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    weight[0, :32] = 0
    parsed, by = Scheme.parse(scheme), curvature(columns)
    scale = quantize_absmax(weight, parsed).scale
    native.set_isa(isa)
    try:
        found = round_with_feedback(weight, scale, parsed, by)
    finally:
        native.set_isa("")
    expected = round_by(weight, scale, parsed, by)
    assert int((found != expected).sum()) <= weight.numel() // 1000  # ties: sums are rounded otherwise


@pytest.mark.parametrize("scheme", [Scheme("int8"), Scheme("int4")])
def test_outputs_of_inputs_like_the_sample_are_kept_better(scheme: Scheme) -> None:
    weight = torch.randn(96, 384, generator=torch.Generator().manual_seed(1))
    plain = quantize_absmax(weight, scheme)
    values = round_with_feedback(weight, plain.scale, scheme, curvature(384))
    dense = values * plain.scale.float().repeat_interleave(scheme.group_size, 1)
    x = inputs(384)
    assert cost(x, weight, dense) < 0.5 * cost(x, weight, dequantize(plain))


def test_strong_damping_is_rounding_to_nearest() -> None:
    weight = torch.randn(64, 384, generator=torch.Generator().manual_seed(1))
    plain = quantize_absmax(weight, Scheme("int8"))
    values = round_with_feedback(weight, plain.scale, Scheme("int8"), curvature(384, damping=1e9))
    dense = values * plain.scale.float().repeat_interleave(128, 1)
    assert torch.equal(dense, dequantize(plain))


def test_rows_do_not_depend_on_each_other() -> None:
    weight = torch.randn(200, 256, generator=torch.Generator().manual_seed(2))
    scheme, by = Scheme("int8"), curvature(256)
    scale = quantize_absmax(weight, scheme).scale
    whole = round_with_feedback(weight, scale, scheme, by)
    part = round_with_feedback(weight[37:120], scale[37:120], scheme, by)
    assert torch.equal(whole[37:120], part)


def test_inputs_that_say_nothing_give_no_curvature() -> None:
    assert Curvature.of(torch.zeros(8, 64)) is None
    assert Curvature.of(torch.full((8, 64), float("inf"))) is None
    assert Curvature.of(torch.full((8, 64), float("nan"))) is None
    assert Curvature.of(torch.eye(8, 64)) is not None  # columns that are never used


def test_tensors_that_do_not_belong_together_are_refused() -> None:
    weight, scheme = torch.ones(4, 256), Scheme("int8")
    scale = quantize_absmax(weight, scheme).scale
    with pytest.raises(SchemeError, match="a curvature of 128 columns"):
        round_with_feedback(weight, scale, scheme, curvature(128))
    with pytest.raises(SchemeError, match="expected f32"):
        round_with_feedback(weight.bfloat16(), scale, scheme, curvature(256))
    eight = quantize_absmax(weight, Scheme("int8", 64)).scale
    with pytest.raises(SchemeError, match="expected int2 to int8"):
        round_with_feedback(weight, eight, Scheme("nf4", 64), curvature(256))
