"""What joins the halves of an expert is told by what it computes."""

import pytest
import torch
from torch import Tensor
from transformers import GptOssConfig, Qwen2MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

from offload.model.gate import StockGate, gate_of
from quant.kernels.swiglu import SILU, SwiGlu

SIZES = {"hidden_size": 8, "intermediate_size": 8, "moe_intermediate_size": 8}


def test_known_forms_are_recognized_on_the_meta_device() -> None:
    with torch.device("meta"):
        silu = Qwen2MoeExperts(Qwen2MoeConfig(**SIZES, num_experts=2))
        clamped = GptOssExperts(GptOssConfig(**SIZES, num_local_experts=2))
    assert gate_of(silu) == SILU
    assert gate_of(clamped) == SwiGlu(alpha=clamped.alpha, limit=clamped.limit, offset=1.0)


@pytest.mark.parametrize("interleaved", [False, True])
def test_another_form_is_called_as_it_is(interleaved: bool) -> None:
    experts = Qwen2MoeExperts(Qwen2MoeConfig(**SIZES, num_experts=2, hidden_act="gelu"))
    experts.is_concatenated = not interleaved

    def apply(joined: Tensor) -> Tensor:
        gate, up = (joined[..., ::2], joined[..., 1::2]) if interleaved else joined.chunk(2, -1)
        return torch.nn.functional.gelu(gate) * up

    experts._apply_gate = apply  # type: ignore[method-assign]
    made = gate_of(experts)
    gate, up = torch.randn(3, 8), torch.randn(3, 8)
    assert isinstance(made, StockGate)
    # Halves that lie interleaved take torch's scalar erf, others its vectorized one: their last bits differ.
    torch.testing.assert_close(made(gate, up), torch.nn.functional.gelu(gate) * up)
