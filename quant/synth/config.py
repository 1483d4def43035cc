"""The config.json of a model with random weights: of a known one, or of a Llama 4 by its numbers."""

from collections.abc import Mapping
from typing import Any

from quant.model.config import language_section

_ARCHITECTURES = {
    "llama4_text": "Llama4ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
}


def untrained_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the language model alone, ready for random weights: no vision tower, no end-of-text
    token. Raises UnknownFamilyError or CheckpointError for a family that transformers does not have.
    """
    text = dict(language_section(config))
    if config.get("model_type") == "llama4":
        text["model_type"] = "llama4_text"
    text["architectures"] = [_ARCHITECTURES.get(str(text.get("model_type"))) or _class_name(text)]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        text[name] = None
    text["dtype"] = "bfloat16"
    text.pop("torch_dtype", None)
    text.pop("quantization_config", None)
    return text


def _class_name(text: Mapping[str, Any]) -> str:
    from quant.architecture.meta_model import model_class, model_config  # imports transformers

    return str(model_class(model_config(text)).__name__)


def llama4_config(
    *,
    hidden: int,
    layers: int,
    experts_per_layer: int,
    top_k: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    vocab: int,
    dense_every: int = 1,
) -> dict[str, Any]:
    """A text-only Llama 4 of these dimensions; every ``dense_every``-th layer routes, the others are dense."""
    return {
        "model_type": "llama4_text",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_local_experts": experts_per_layer,
        "num_experts_per_tok": top_k,
        "interleave_moe_layer_step": dense_every,
        "intermediate_size": intermediate,
        "intermediate_size_mlp": 2 * intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "attention_chunk_size": 8192,
        "no_rope_layer_interval": 4,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
        "attn_temperature_tuning": True,
        "use_qk_norm": True,
        "tie_word_embeddings": False,
    }
