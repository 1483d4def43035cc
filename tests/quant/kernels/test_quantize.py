"""The native quantizer writes the same bits as the torch reference, whatever the source looks like."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.errors import MachineError, SchemeError
from quant.kernels import native
from quant.kernels.quantize import Quantized, quantize_pack
from quant.pack import Packed, dequantize, quantize_absmax
from quant.rounding.search import search
from quant.scheme import GROUP_SIZES, Kind, Scheme

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def hostile(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Weights with rows of zeros, of one spike, of subnormals and of ties between two integers."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= torch.exp(torch.randn(rows, 1, generator=generator) * 3)
    shapes = (0.0, 1e-30, 1e-38, 2e-41, 1e12)
    for row, factor in zip(range(rows), shapes, strict=False):
        weight[row] *= factor
    if rows > len(shapes):
        weight[len(shapes)] = (weight[len(shapes)] * 4).round() / 2
    limit = 6e4 if dtype is torch.float16 else 1e15
    return weight.clamp(-limit, limit).to(dtype)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "neon", "portable"])
@pytest.mark.parametrize("transposed", [False, True])
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 150),
    groups=st.integers(1, 5),
    group_size=st.sampled_from(GROUP_SIZES),
    kind=st.sampled_from(["int2", "int3", "int4", "int8"]),
    dtype=st.sampled_from(DTYPES),
    margin=st.integers(0, 40),
    seed=st.integers(0, 99),
)
def test_packed_words_and_scales_equal_the_reference_to_the_bit(
    isa: str,
    transposed: bool,
    rows: int,
    groups: int,
    group_size: int,
    kind: Kind,
    dtype: torch.dtype,
    margin: int,
    seed: int,
) -> None:
    if isa not in native.isas():
        pytest.skip(f"this processor does not run {isa}")
    weight = hostile(rows, groups * group_size, dtype, seed)
    source = weight.t() if transposed else weight
    wide = torch.full((source.shape[0], source.shape[1] + 2 * margin), 9.0, dtype=dtype)
    wide[:, margin : margin + source.shape[1]] = source
    native.set_isa(isa)
    try:
        got = quantize_pack(wide[:, margin : margin + source.shape[1]], kind, group_size, transposed)
    finally:
        native.set_isa("")
    expected = quantize_absmax(weight, Scheme(kind, group_size))
    assert torch.equal(got.scale, expected.scale)
    assert torch.equal(got.packed, expected.packed)
    assert got.finite
    assert got.squared_sum == pytest.approx(weight.double().square().sum().item(), rel=1e-3)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "neon", "portable"])
@pytest.mark.parametrize("transposed", [False, True])
@settings(max_examples=10, deadline=None)
@given(
    rows=st.integers(1, 90),
    groups=st.integers(1, 3),
    group_size=st.sampled_from(GROUP_SIZES),
    kind=st.sampled_from(["int2", "int3", "int4"]),
    dtype=st.sampled_from(DTYPES),
    spread=st.sampled_from([None, 0, 3, 127]),
    seed=st.integers(0, 99),
)
def test_searched_scales_and_balanced_values_equal_the_reference_to_the_bit(
    isa: str,
    transposed: bool,
    rows: int,
    groups: int,
    group_size: int,
    kind: Kind,
    dtype: torch.dtype,
    spread: int | None,
    seed: int,
) -> None:
    if isa not in native.isas():
        pytest.skip(f"this processor does not run {isa}")
    weight = hostile(rows, groups * group_size, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    means = None
    if spread is not None:
        means = torch.randint(-spread, spread + 1, (weight.shape[1],), generator=generator, dtype=torch.int32)
    native.set_isa(isa)
    try:
        source = weight.t().contiguous() if transposed else weight
        got = quantize_pack(source, kind, group_size, transposed, search=True, means=means)
    finally:
        native.set_isa("")
    expected = search(weight, Scheme(kind, group_size), means)
    assert torch.equal(got.scale, expected.scale)
    assert torch.equal(got.packed, expected.packed)
    assert got.finite
    assert torch.isfinite(got.scale).all() and (got.scale != 0).all()


def test_a_search_leaves_less_error_than_absmax() -> None:
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    plain, searched = (quantize_pack(weight, "int4", 128, search=use) for use in (False, True))
    assert searched.squared_error < 0.85 * plain.squared_error


def test_balanced_rounding_keeps_the_product_with_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 512, generator=generator)
    means = torch.randint(-127, 128, (512,), generator=generator, dtype=torch.int32)

    def bias(packed: Quantized) -> float:
        dense = dequantize(Packed(Scheme("int4"), packed.packed, packed.scale))
        return float(((dense - weight) @ means.float()).square().mean().sqrt())

    free = quantize_pack(weight, "int4", 128, search=True)
    balanced = quantize_pack(weight, "int4", 128, search=True, means=means)
    assert bias(balanced) < 0.5 * bias(free)
    assert balanced.squared_error < 1.05 * free.squared_error


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_value_that_is_not_finite_is_reported(transposed: bool, value: float, dtype: torch.dtype) -> None:
    weight = torch.ones(256, 256, dtype=dtype)
    weight[70, 201] = value
    assert not quantize_pack(weight, "int4", 128, transposed).finite


def test_signal_to_noise_is_that_of_the_rounding() -> None:
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    assert 18 < quantize_pack(weight, "int4", 128).sqnr_db < 22
    assert 42 < quantize_pack(weight, "int8", 128).sqnr_db < 46


def test_shapes_and_dtypes_that_cannot_be_packed_are_refused() -> None:
    with pytest.raises(SchemeError, match="do not divide 200"):
        quantize_pack(torch.ones(4, 200), "int4", 128)
    with pytest.raises(SchemeError, match="expected bf16, fp16 or f32"):
        quantize_pack(torch.ones(4, 128, dtype=torch.float64), "int4", 128)
    with pytest.raises(SchemeError, match="no searched scales"):
        quantize_pack(torch.ones(4, 128), "int8", 128, search=True)
    with pytest.raises(SchemeError, match=r"expected int32 \[128\]"):
        quantize_pack(torch.ones(4, 128), "int4", 128, search=True, means=torch.ones(64, dtype=torch.int32))
    with pytest.raises(SchemeError, match="expected int2 to int8"):
        quantize_pack(torch.ones(4, 128), "nf4", 64)


def test_an_instruction_set_this_machine_lacks_is_refused() -> None:
    with pytest.raises(MachineError, match=r"expected one of .*portable"):
        native.set_isa("sse9")
