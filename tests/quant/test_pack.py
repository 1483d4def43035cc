"""The reference of packing against what the format says, compressed-tensors' own code, and bitsandbytes'."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.errors import SchemeError
from quant.pack import Packed, dequantize, dequantize_nf4, pack, quantize_absmax, quantize_nf4, unpack
from quant.scheme import Kind, Scheme

KINDS: list[Kind] = ["int2", "int3", "int4", "int8"]


def random_weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def test_element_i_of_an_int4_word_is_at_bits_4i_and_offset_by_8() -> None:
    values = torch.tensor([[-8, -7, -1, 0, 1, 2, 6, 7]], dtype=torch.int8)
    assert pack(values, 4).view(torch.uint8).tolist() == [[0x10, 0x87, 0xA9, 0xFE]]


def test_int8_words_hold_four_values_offset_by_128() -> None:
    values = torch.tensor([[-128, -1, 0, 127]], dtype=torch.int8)
    assert pack(values, 8).view(torch.uint8).tolist() == [[0, 127, 128, 255]]


def test_the_eleventh_int3_of_a_row_lies_across_two_words() -> None:
    values = torch.full((1, 32), -4, dtype=torch.int8)
    values[0, 10] = 1  # stored as 101, at bits 30 to 32
    assert pack(values, 3).tolist() == [[1 << 30, 1, 0]]


def test_sixteen_int2_share_a_word_lowest_first() -> None:
    values = torch.tensor([[-2, -1, 0, 1] * 4], dtype=torch.int8)
    assert pack(values, 2).view(torch.uint8).tolist() == [[0xE4] * 4]


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 9), words=st.integers(1, 9), bits=st.sampled_from([2, 3, 4, 8]), seed=st.integers(0, 999))
def test_packing_is_compressed_tensors_packing(rows: int, words: int, bits: int, seed: int) -> None:
    top = 2 ** (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-top, top, (rows, words * 32), dtype=torch.int8, generator=generator)
    packed = pack(values, bits)
    assert torch.equal(packed, pack_to_int32(values, bits))
    assert torch.equal(unpack(packed, bits), values)
    assert torch.equal(unpack_from_int32(packed, bits, values.shape), values)


@pytest.mark.parametrize("kind", KINDS)
def test_scales_are_compressed_tensors_scales(kind: Kind) -> None:
    weight = random_weight(16, 256)
    groups = weight.reshape(16, 2, 128)
    arguments = QuantizationArgs(num_bits=Scheme(kind).bits, strategy="group", group_size=128)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    assert torch.equal(quantize_absmax(weight, Scheme(kind)).scale, scale.bfloat16()) and not zero.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_no_value_is_further_from_its_weight_than_half_a_step(kind: Kind, group: int) -> None:
    weight = random_weight(32, 512)
    packed = quantize_absmax(weight, Scheme(kind, group))
    error = (dequantize(packed) - weight).abs().reshape(32, -1, group)
    # The largest of a group may be clipped: 7.5 steps are rounded to 7 or -8; the scale itself is rounded to
    # bf16.
    assert (error <= packed.scale.float().unsqueeze(-1) * 0.55).float().mean() > 0.99
    assert (error <= packed.scale.float().unsqueeze(-1) * 1.1).all()


@pytest.mark.parametrize("kind", KINDS[1:])  # two bits clip the largest value of a group, which moves the scale
def test_quantizing_what_was_dequantized_changes_little(kind: Kind) -> None:
    once = dequantize(quantize_absmax(random_weight(8, 256), Scheme(kind)))
    twice = dequantize(quantize_absmax(once, Scheme(kind)))
    assert (twice - once).norm() / once.norm() < {"int3": 0.15, "int4": 0.08, "int8": 0.01}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_of_zeros_and_one_of_denormals_come_back_as_zeros(kind: Kind) -> None:
    weight = torch.zeros(2, 256)
    weight[1, :128] = 1e-44
    packed = quantize_absmax(weight, Scheme(kind))
    assert torch.isfinite(packed.scale).all() and (packed.scale > 0).all()
    assert not dequantize(packed).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_are_refused(value: float) -> None:
    weight = random_weight(2, 128)
    weight[1, 77] = value
    with pytest.raises(SchemeError, match="NaN or Inf"):
        quantize_absmax(weight, Scheme("int4"))


def test_shapes_follow_from_the_tensors() -> None:
    packed = quantize_absmax(random_weight(6, 256), Scheme("int4", 64))
    assert (packed.out_features, packed.in_features) == (6, 256)
    tensors = packed.tensors()
    assert tensors["weight_packed"].shape == (6, 32) and tensors["weight_scale"].shape == (6, 4)
    assert tensors["weight_shape"].tolist() == [6, 256] and tensors["weight_shape"].dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantized_is_value_times_scale_in_the_dtype_asked_for(dtype: torch.dtype) -> None:
    packed = Packed(
        Scheme("int4", 32), pack(torch.full((1, 32), 7, dtype=torch.int8), 4), torch.ones(1, 1).bfloat16() * 0.1
    )
    expected = torch.tensor(7, dtype=dtype) * torch.tensor(0.1).bfloat16().to(dtype)
    assert (dequantize(packed, dtype) == expected).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_nf4_round_trips_through_bitsandbytes_in_its_source_dtype(dtype: torch.dtype) -> None:
    weight = random_weight(32, 128).to(dtype)
    tensors = quantize_nf4(weight)
    assert tensors["weight"].shape == (32 * 128 // 2, 1) and tensors["weight"].dtype == torch.uint8
    assert tensors["weight.absmax"].numel() == 32 * 128 // 64
    dense = dequantize_nf4(tensors)
    assert dense.dtype == dtype and dense.shape == weight.shape
    assert (dense.float() - weight.float()).norm() / weight.float().norm() < 0.12
