"""The tiny checkpoints are what they claim: loadable, in the real key layout, lively enough to fail."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from tests.checkpoints import FAMILIES, make

Tiny = Callable[..., Path]


def keys(folder: Path) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            found |= {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_family_loads_in_transformers_with_no_key_missing(tiny: Tiny, family: str, shards: int) -> None:
    folder = tiny(family, shards=shards)
    assert len(list(folder.glob("*.safetensors"))) == shards
    assert (folder / "model.safetensors.index.json").exists() == (shards > 1)
    _, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    # A causal LM leaves these out of a multimodal Llama 4.
    vision = ("vision_model.", "multi_modal_projector.")
    assert all(key.startswith(vision) for key in info["unexpected_keys"])


def test_multimodal_llama4_loads_whole_as_image_text_to_text(tiny: Tiny) -> None:
    model, info = AutoModelForImageTextToText.from_pretrained(tiny("llama4"), output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_of_order_one_and_tokens_spread_over_experts(tiny: Tiny, family: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32).eval()
    tokens = torch.randint(256, (1, 96), generator=torch.Generator().manual_seed(1))
    chosen: list[torch.Tensor] = []
    for name, module in model.named_modules():
        if name.endswith((".router", ".mlp.gate")):
            top_k = model.config.get_text_config().num_experts_per_tok
            module.register_forward_hook(
                lambda _m, _i, out, k=top_k: chosen.append(_router_logits(out).topk(k, dim=-1).indices)
            )
    with torch.no_grad():
        logits = model(tokens).logits
    assert 0.5 < logits.std() < 2
    assert chosen and all(len(indices.unique()) >= 6 for indices in chosen)


def _router_logits(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The [T, E] output with finite values: Llama 4's router masks its scores."""
    outputs = output if isinstance(output, tuple) else (output,)
    return next(o for o in reversed(outputs) if o.dtype.is_floating_point and o.shape[-1] == 8)


def test_scout_like_layers_are_all_moe_with_chunked_and_nope_attention(tiny: Tiny) -> None:
    config = AutoModelForCausalLM.from_pretrained(tiny("llama4_text")).config
    assert config.layer_types == ["chunked_attention"] * 3 + ["full_attention"]
    assert config.no_rope_layers == [1, 1, 1, 0] and config.moe_layers == [0, 1, 2, 3]
    shapes = keys(tiny("llama4_text"))
    assert shapes["model.layers.0.feed_forward.experts.gate_up_proj"] == [8, 128, 256]
    assert shapes["model.layers.0.feed_forward.experts.down_proj"] == [8, 128, 128]


def test_maverick_like_layers_alternate_dense_and_moe(tiny: Tiny) -> None:
    shapes = keys(tiny("llama4_maverick"))
    assert shapes["model.layers.0.feed_forward.gate_proj.weight"] == [256, 128]
    assert shapes["model.layers.1.feed_forward.experts.gate_up_proj"] == [8, 128, 256]
    assert "model.layers.2.feed_forward.experts.gate_up_proj" not in shapes


def test_multimodal_llama4_has_the_language_model_prefix_vision_tower_and_projector(tiny: Tiny) -> None:
    shapes = keys(tiny("llama4"))
    assert "language_model.model.layers.0.feed_forward.experts.gate_up_proj" in shapes
    assert "language_model.lm_head.weight" in shapes
    assert "vision_model.model.layers.1.self_attn.q_proj.weight" in shapes
    assert shapes["multi_modal_projector.linear_1.weight"] == [128, 64]


def test_other_families_store_experts_one_by_one_or_fused(tiny: Tiny) -> None:
    assert keys(tiny("mixtral"))["model.layers.0.block_sparse_moe.experts.7.w1.weight"] == [128, 128]
    assert keys(tiny("olmoe"))["model.layers.3.mlp.experts.7.gate_proj.weight"] == [128, 128]
    assert "model.layers.1.mlp.gate_proj.weight" in keys(tiny("qwen3_moe"))
    for family in ("mixtral_fused", "qwen3_moe_fused", "olmoe_fused"):
        assert keys(tiny(family))["model.layers.0.mlp.experts.gate_up_proj"] == [8, 256, 128]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_fused_and_per_expert_checkpoints_are_the_same_model(tiny: Tiny, family: str) -> None:
    tokens = torch.arange(40).unsqueeze(0)
    with torch.no_grad():
        one, two = (
            AutoModelForCausalLM.from_pretrained(tiny(name), dtype=torch.float32)(tokens).logits
            for name in (family, f"{family}_fused")
        )
    assert torch.equal(one, two)


def test_same_arguments_make_the_same_bytes_and_leave_the_random_state_alone(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    one, two = (make("mixtral", tmp_path / name) for name in ("one", "two"))
    assert torch.equal(before, torch.random.get_rng_state())
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


def test_byte_tokenizer_round_trips_any_text_within_the_vocabulary(tiny: Tiny) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny("mixtral"))
    text = "def f(x):\n    return x  # é ☃\x00"
    tokens = tokenizer.encode(text)
    assert len(tokens) == len(text.encode()) and max(tokens) < 256
    assert tokenizer.decode(tokens) == text


def test_demo_model_loads_in_transformers(demo_model: Path) -> None:
    _, info = AutoModelForCausalLM.from_pretrained(demo_model, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert AutoTokenizer.from_pretrained(demo_model).chat_template
