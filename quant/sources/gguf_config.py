"""config.json of a GGUF model: from its metadata, where that says all of it, or from a directory beside it.

The metadata has llama.cpp's names, ``ARCHITECTURE.embedding_length`` and so on. What it does not say is refused rather
than guessed: the settings of a scaled rotary embedding, and Llama 4, whose chunks, norms and scaling llama.cpp has in
its own code. For those the original's config.json is asked for.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quant.errors import CheckpointError
from quant.input_file import short
from quant.model.config import read_config
from quant.sources.gguf_file import GgufFile
from quant.sources.gguf_names import ROPE

DIRECTORY = "give the directory of the original's config.json and tokenizer with --tokenizer DIR"
Read = Callable[[str], Any]


def _mixtral(read: Read) -> dict[str, Any]:
    return {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "intermediate_size": read("feed_forward_length"),
        "num_local_experts": read("expert_count"),
        "num_experts_per_tok": read("expert_used_count"),
    }


def _qwen3_moe(read: Read) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "intermediate_size": read("feed_forward_length"),
        "moe_intermediate_size": read("expert_feed_forward_length"),
        "num_experts": read("expert_count"),
        "num_experts_per_tok": read("expert_used_count"),
        "norm_topk_prob": True,
    }


def _olmoe(read: Read) -> dict[str, Any]:
    return {
        "model_type": "olmoe",
        "architectures": ["OlmoeForCausalLM"],
        "intermediate_size": read("feed_forward_length"),
        "num_experts": read("expert_count"),
        "num_experts_per_tok": read("expert_used_count"),
        "norm_topk_prob": False,
    }


_ARCHITECTURES: Mapping[str, Callable[[Read], dict[str, Any]]] = {
    "llama": _mixtral,
    "qwen3moe": _qwen3_moe,
    "olmoe": _olmoe,
}
# Keys of the architecture that change nothing about these models, and those that do not while they have such a value.
_WITHOUT_MEANING = {"vocab_size", "expert_feed_forward_length", "attention.layer_norm_epsilon"}
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.sliding_window": (0,),
    "expert_gating_func": (0, 1),  # softmax
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_weights_scale": (0.0, 1.0),
    "leading_dense_block_count": (0,),
}
_COMMON = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}


def gguf_config(file: GgufFile, directory: Path | None) -> dict[str, Any]:
    """The config of the model in ``file``, that of ``directory`` if it has one. Raises CheckpointError."""
    if directory is not None and (directory / "config.json").is_file():
        return _language_model(read_config(directory))
    kind, said = file.architecture, file.metadata
    make = _ARCHITECTURES.get(kind)
    if make is None:
        raise CheckpointError(
            f"{file.path} is of architecture {short(kind)}, whose settings are not read from GGUF (those of "
            f"{', '.join(_ARCHITECTURES)} are): {DIRECTORY}"
        )
    if kind == "llama" and not said.get("llama.expert_count"):
        raise CheckpointError(f"{file.path} is a dense model of architecture llama: expected one with experts")
    if ROPE in file.tensors or _is_scaled(said, f"{kind}.rope."):
        raise CheckpointError(f"{file.path} has a scaled rotary embedding, which GGUF does not say all of: {DIRECTORY}")

    def read(name: str) -> Any:
        if f"{kind}.{name}" not in said:
            raise CheckpointError(f"{file.path} has no {kind}.{name} in its metadata: {DIRECTORY}")
        return said[f"{kind}.{name}"]

    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{file.path} has no token_embd.weight: expected a whole model")
    found = make(read) | {name: read(theirs) for name, theirs in _COMMON.items()}
    found |= {
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "dtype": "bfloat16",
    }
    if (size := said.get(f"{kind}.attention.key_length")) is not None and kind != "olmoe":
        found["head_dim"] = size
    _check_rest(file, kind, found)
    for name in ("bos", "eos"):
        found[f"{name}_token_id"] = token = said.get(f"tokenizer.ggml.{name}_token_id")
        if token is not None and type(token) is not int:
            raise CheckpointError(f"{file.path}: tokenizer.ggml.{name}_token_id is {short(token)}: expected a number")
    dense = _dense_layers(file, found)
    return found | ({"mlp_only_layers": dense} if dense else {})


def _is_scaled(said: Mapping[str, Any], prefix: str) -> bool:
    """Whether positions are scaled for the rotary embedding; a factor without a type is linear."""
    kind = said.get(f"{prefix}scaling.type")
    factors = [said.get(prefix + name, 1.0) for name in ("scaling.factor", "scale_linear")]
    return kind not in (None, "none", "") or (kind is None and any(factor not in (0.0, 1.0) for factor in factors))


def _check_rest(file: GgufFile, kind: str, found: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a setting of the architecture that ``found`` does not have in it."""
    size = found.get("head_dim")
    if size is None and isinstance(found["hidden_size"], int) and isinstance(found["num_attention_heads"], int):
        size = found["hidden_size"] // max(1, found["num_attention_heads"])
    neutral = {
        **_NEUTRAL,
        **dict.fromkeys(("attention.key_length", "attention.value_length", "rope.dimension_count"), (size,)),
        "expert_weights_norm": (found.get("norm_topk_prob", True),),
    }
    read = {*_COMMON.values(), *_WITHOUT_MEANING, "feed_forward_length", "expert_count", "expert_used_count"}
    for key, value in file.metadata.items():
        name = key.removeprefix(f"{kind}.")
        if name == key or name in read or name.startswith(("rope.scaling.", "rope.scale_linear")):
            continue
        if value not in neutral.get(name, ()):
            raise CheckpointError(f"{file.path} says {key} = {short(value)}, which is not read from GGUF: {DIRECTORY}")


def _dense_layers(file: GgufFile, found: Mapping[str, Any]) -> list[int]:
    """The layers without experts."""
    count = found["num_hidden_layers"]
    if found["model_type"] != "qwen3_moe" or not isinstance(count, int) or not 0 <= count <= len(file.tensors):
        return []
    return [layer for layer in range(count) if f"blk.{layer}.ffn_gate_inp.weight" not in file.tensors]


def _language_model(config: dict[str, Any]) -> dict[str, Any]:
    """The language model alone of a multimodal config: a GGUF file has no more than that."""
    text = config.get("text_config")
    if config.get("model_type") != "llama4" or not isinstance(text, dict):
        return {key: value for key, value in config.items() if key != "quantization_config"}
    kept = {key: config[key] for key in ("dtype", "torch_dtype", "tie_word_embeddings") if key in config}
    return kept | text | {"model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"]}
