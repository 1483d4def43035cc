"""The product on packed weights equals the reference for any shape, one token to many, both widths."""

import pytest
import torch

from quant.errors import SchemeError
from quant.kernels.cuda import linear
from quant.linear import Compute, LinearWeight, matmul
from quant.pack import Packed, matmul_nf4, quantize_nf4
from quant.scheme import Kind, Scheme
from tests.quant.kernels.cuda.images import assert_near, packed

HALF = 2**-7  # bf16, which the interpreter cuts off instead of rounding


@pytest.mark.parametrize(
    ("kind", "group", "rows", "columns", "tokens"),
    [
        ("int4", 128, 200, 384, 1),
        ("int4", 32, 17, 1056, 1),
        ("int8", 64, 130, 192, 1),
        ("int8", 256, 16, 1024, 1),
        ("int4", 128, 48, 384, 2),
        ("int4", 256, 33, 512, 8),
        ("int4", 32, 48, 96, 5),
        ("int4", 64, 20, 192, 17),
        ("int8", 128, 40, 256, 70),
        ("int8", 32, 140, 32, 33),
        ("int8", 64, 31, 320, 16),
        ("int2", 64, 40, 192, 1),
        ("int2", 32, 17, 1056, 1),
        ("int2", 256, 33, 512, 8),
        ("int2", 64, 20, 320, 17),
        ("int3", 128, 200, 384, 1),
        ("int3", 32, 17, 1056, 1),
        ("int3", 256, 20, 768, 1),
        ("int3", 64, 33, 576, 9),
        ("int3", 32, 40, 96, 33),
    ],
)
def test_equals_the_reference(
    kind: Kind, group: int, rows: int, columns: int, tokens: int, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = packed(rows, columns, Scheme(kind, group), generator)
    x = torch.randn(tokens, columns, generator=generator).bfloat16()
    start = torch.randn(tokens, rows, generator=generator)
    moved = x.to(device), Packed(weight.scheme, weight.packed.to(device), weight.scale.to(device))
    # Groups of less than 16 words are applied to the weights before the tensor core, in bf16 on a card; there
    # sums of exact products are cut off after each step, not rounded.
    values = 32 if kind == "int3" else 32 // weight.scheme.bits  # of a unit
    exact = device.type == "cpu" or tokens == 1 or group >= 16 * values
    slack = 1e-6 if device.type == "cpu" else 1e-5
    added = linear.launch_linear(*moved, start.clone().to(device))
    assert_near(added, linear.linear_reference(x, weight, start.clone()), slack if exact else HALF)
    plain = linear.launch_linear(*moved)
    assert plain.dtype == torch.bfloat16
    assert_near(plain, linear.linear_reference(x, weight), HALF)


def test_tensors_on_the_cpu_get_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = packed(24, 64, Scheme("int4", 32), generator)
    x = torch.randn(2, 64, generator=generator)
    y = linear.cuda_linear(x, weight)
    stored = LinearWeight(weight.scheme, weight.tensors(), 24, 64)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, matmul(x, stored, Compute()))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_matmul_sends_packed_and_nf4_weights_to_the_fused_kernels(kind: str, tokens: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, 256, generator=generator).bfloat16().cuda()
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
        tensors = quantize_nf4((torch.randn(192, 256, generator=generator) / 16).bfloat16().cuda())
        weight = LinearWeight(Scheme("nf4"), tensors, 192, 256)
    else:
        int8 = packed(192, 256, Scheme("int8", 64), generator)
        placed = {name: tensor.cuda() for name, tensor in int8.tensors().items()}
        weight = LinearWeight(int8.scheme, placed, 192, 256)
    ours = matmul(x[None], weight, Compute(triton=True))
    assert ours.shape == (1, tokens, 192)
    assert_near(ours, torch.nn.functional.linear(x.float(), weight.dense(torch.float32))[None], 2e-2)


@pytest.mark.parametrize("shape", [(1, 256), (1, 5, 256)])
def test_bitsandbytes_multiplies_nf4_weights_as_they_dequantize(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(2)
    tensors = quantize_nf4((torch.randn(256, 256, generator=generator) / 16).bfloat16())
    weight = LinearWeight(Scheme("nf4"), tensors, 256, 256)
    x = torch.randn(shape, generator=generator).bfloat16()
    ours = matmul_nf4(x, tensors["weight"], weight.nf4_state)
    assert_near(ours, torch.nn.functional.linear(x.float(), weight.dense(torch.float32)), 2e-2)


def test_the_compute_says_what_it_is() -> None:
    assert Compute(triton=True).name == "Triton, bf16 activations"
    assert Compute(triton=True, exact=True).name == "torch, dequantized weights"


def test_what_does_not_fit_is_refused() -> None:
    weight = packed(24, 64, Scheme("int4", 32), torch.Generator().manual_seed(0))
    x = torch.zeros(1, 64)
    with pytest.raises(SchemeError, match=r"expected \[T, 64\]"):
        linear.cuda_linear(x[:, :32], weight)
    with pytest.raises(SchemeError, match="expected int4-g64 weights"):
        linear.cuda_linear(x, Packed(Scheme("int4", 64), weight.packed, weight.scale))
    with pytest.raises(SchemeError, match="expected f32"):
        linear.cuda_linear(x, weight, torch.zeros(1, 24).bfloat16())
    with pytest.raises(SchemeError, match="take bf16"):
        linear.launch_linear(x, weight)
