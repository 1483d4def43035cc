"""Parts of a decode step that whole models of one scheme per role do not reach."""

import pytest
import torch
from torch import nn
from torch.nn.functional import silu

from offload.decode.gpu_step import _Gated
from quant.kernels.cuda.experts import DecodeScratch
from quant.linear import Compute, QuantLinear
from quant.pack import quantize_absmax
from quant.scheme import Scheme

INT4, INT8, BF16 = Scheme("int4"), Scheme("int8"), Scheme("bf16")


def _linear(rows: int, columns: int, scheme: Scheme) -> QuantLinear:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) / columns**0.5
    linear = QuantLinear(rows, columns, scheme, Compute())
    if scheme.is_packed:
        stored = quantize_absmax(weight, scheme)
        linear.weight_packed.data, linear.weight_scale.data = stored.packed, stored.scale
    else:
        linear.weight.data = weight.bfloat16()
    return linear


@pytest.mark.parametrize(
    ("schemes", "fused"), [((INT4, INT4, INT8), True), ((INT4, INT8, INT4), False), ((BF16,) * 3, False)]
)
def test_a_gated_mlp_is_the_same_however_it_is_stored(schemes: tuple[Scheme, Scheme, Scheme], fused: bool) -> None:
    module = nn.Module()
    for name, scheme, (rows, columns) in zip(
        ("gate_proj", "up_proj", "down_proj"), schemes, ((256, 128), (256, 128), (128, 256)), strict=True
    ):
        module.add_module(name, _linear(rows, columns, scheme))
    device = torch.device("cpu")
    gated, x, out = _Gated(module, device), torch.randn(1, 128), torch.randn(1, 128)
    expected = out + module.down_proj(silu(module.gate_proj(x)) * module.up_proj(x))  # type: ignore[operator]
    assert (gated.layout is not None) == fused
    scratch = None if gated.layout is None else DecodeScratch.allocate(gated.layout, 1, 1, device)
    gated.add(x, scratch, out)
    assert torch.allclose(out, expected, atol=1e-5)
