"""Tiny random checkpoints of families that no table of ours names, saved by transformers itself.

Each has what its real models have, as small as it goes: layers without experts, shared experts with and without
gates, router biases, windows, states. Every K that is quantized is a multiple of 128.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedModel

from quant.architecture.meta_model import model_class
from tests.checkpoints import byte_tokenizer

_SEED = 20251129
COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.08,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
_DEEPSEEK: dict[str, Any] = {
    **_MLA,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_moe": {
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 256,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "mlp_only_layers": [1],
    },
    "deepseek_v2": {
        **_DEEPSEEK,
        "q_lora_rank": None,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 1.5,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
    },
    "deepseek_v3": {**_DEEPSEEK, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
    "glm4_moe": {
        "head_dim": 32,
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "attention_bias": True,
        "use_qk_norm": True,
    },
    "gpt_oss": {
        "head_dim": 32,
        "intermediate_size": 128,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "flex_olmo": {"intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 3},
    "granitemoe": {
        "intermediate_size": 128,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    },
    "phimoe": {"intermediate_size": 128, "num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 32},
    "ernie4_5_moe": {
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "moe_num_experts": 8,
        "moe_k": 3,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
    "minimax_m2": {
        "head_dim": 32,
        "intermediate_size": 128,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "rotary_dim": 16,
    },
    "hunyuan_v1_moe": {
        "head_dim": 32,
        "intermediate_size": 128,
        "moe_intermediate_size": 128,
        "num_experts": 8,
        "moe_topk": 3,
        "num_shared_expert": 1,
    },
    "dots1": {
        "head_dim": 32,
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "lfm2_moe": {
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "jamba": {
        "intermediate_size": 128,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 0,
        "use_mamba_kernels": False,
        "mamba_d_state": 16,
        "mamba_dt_rank": 8,
    },
    "qwen3_next": {
        "head_dim": 32,
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 128,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "qwen3_vl_moe": {
        "head_dim": 32,
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 6, 4]},
    },
    "llama": {"intermediate_size": 256},
    "qwen3": {"intermediate_size": 256, "head_dim": 32},
    "mistral": {"intermediate_size": 256, "head_dim": 32, "sliding_window": 16},
}
DENSE = ("llama", "qwen3", "mistral")
TABLED = ("llama4", "llama4_text", "mixtral", "qwen3_moe", "olmoe")
_VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 128,
    "deepstack_visual_indexes": [0],
    "num_position_embeddings": 16,
}


def make_family(kind: str, dst: Path, *, dtype: torch.dtype = torch.bfloat16, **overrides: Any) -> Path:
    """Save a tiny random checkpoint of model_type ``kind``, with a byte tokenizer, under ``dst`` and return it."""
    given = {**COMMON, **FAMILIES[kind], **overrides}
    if kind == "qwen3_vl_moe":
        given = {"text_config": given, "vision_config": _VISION, "tie_word_embeddings": False}
    config = CONFIG_MAPPING[kind](**given)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = model_class(config)(config).eval()
        _roughen(model)
    model.to(dtype).save_pretrained(dst)
    byte_tokenizer().save_pretrained(dst)
    return dst


def _roughen(model: PreTrainedModel) -> None:
    """Nothing that is one or zero in a new model stays so: what is dropped or applied twice then shows."""
    for name, parameter in model.named_parameters():
        last, values = name.rpartition(".")[2], parameter.data
        if last in ("A_log", "D", "dt_bias"):
            continue
        if "norm" in name and last == "weight":
            values.copy_(values + torch.randn_like(values) * 0.1)
        elif last == "bias" or last.endswith("_bias") or last == "sinks":
            values.normal_(0.0, 0.2)
        elif "embed_tokens" in name:
            values.normal_(0.0, 0.5)
        elif "lm_head" in name:
            values.normal_(0.0, values.shape[-1] ** -0.5)
        elif values.dim() == 2 and values.shape[0] == 8:  # a router
            values.normal_(0.0, 2 * values.shape[-1] ** -0.5)
        elif "experts." in name or values.std() == 0:
            values.normal_(0.0, 0.08)
    for name, buffer in model.named_buffers():
        if name.endswith("bias"):  # by which a router's choice is corrected
            buffer.normal_(0.0, 0.1)
