"""config.json read and checked, once for all commands.

Whoever reads a config reads it through here, so that a size is a number within reason before anything is
counted, looped over or allocated by it, and the same keys are refused everywhere. Two liberties of public
configs are put right: ``attn_temperature_tuning: 4``, which means true, and ``attention_chunk_size: null``,
which means that no layer is chunked.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quant.errors import CheckpointError
from quant.input_file import is_there, read_object, validated
from quant.model.families import Family, family_of, is_tabled
from quant.model.text_config import (
    ANY_CHUNK,
    MAX_EXPERTS,
    MAX_LAYERS,
    Llama4Text,
    MixtralText,
    OlmoeText,
    Qwen3MoeText,
    TextConfig,
    VisionConfig,
)

_TEXTS: dict[str, type[TextConfig]] = {
    "llama4": Llama4Text,
    "mixtral": MixtralText,
    "qwen3_moe": Qwen3MoeText,
    "olmoe": OlmoeText,
}


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a model directory, or the config.json at ``path``, as it is.

    Raises CheckpointError if it is absent or no JSON object."""
    file = path / "config.json" if path.is_dir() else path
    if not is_there(path):
        raise CheckpointError(f"{path}: no such directory; expected a Hugging Face model directory")
    if not is_there(file):
        raise CheckpointError(f"{path}: no config.json in it; expected a Hugging Face model directory")
    return read_object(file, "a model's config")


def put_right(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` without the two liberties of the module's docstring; anything else as it is."""
    if config.get("model_type") not in ("llama4", "llama4_text"):
        return dict(config)
    key = "text_config"
    if config["model_type"] == "llama4" and isinstance(config.get(key), dict):
        return {**config, key: _llama4_put_right(config[key])}
    return _llama4_put_right(config)


def _llama4_put_right(text: Mapping[str, Any]) -> dict[str, Any]:
    made, tuning, layers = dict(text), text.get("attn_temperature_tuning"), text.get("num_hidden_layers")
    if isinstance(tuning, int) and tuning in (0, 1, 4):
        made["attn_temperature_tuning"] = bool(tuning)
    if "attention_chunk_size" in text and text["attention_chunk_size"] is None and isinstance(layers, int):
        made["layer_types"] = ["full_attention"] * min(max(layers, 0), MAX_LAYERS)
        made["attention_chunk_size"] = ANY_CHUNK
    return made


def language_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that describes the language model: ``text_config`` of a multimodal one.

    Raises CheckpointError if that is none.
    """
    if config.get("model_type") != "llama4":
        return config
    text = config.get("text_config")
    if not isinstance(text, dict):
        raise CheckpointError(
            "config.json of model_type 'llama4' has no 'text_config' object: expected the config that transformers "
            "saves beside the weights"
        )
    kind = text.get("model_type", "llama4_text")
    if kind != "llama4_text":
        raise CheckpointError(f"config.json: text_config.model_type is {kind!r}: expected 'llama4_text'")
    return text


def quantization_of(config: Mapping[str, Any]) -> Any:
    """What a config.json's dict says of quantization, unchecked; None if that is nothing. Null is nothing."""
    found = config.get("quantization_config")
    if found is None and config.get("model_type") == "llama4" and isinstance(config.get("text_config"), dict):
        found = config["text_config"].get("quantization_config")
    return found


def language_config(config: Mapping[str, Any]) -> tuple[Family, TextConfig]:
    """The family of a config.json's dict and its language model's record.

    Raises UnknownFamilyError, or CheckpointError naming the key that is missing or wrong.
    """
    family, text = family_of(config.get("model_type")), dict(language_section(put_right(config)))
    if "tie_word_embeddings" in config:  # of a multimodal config it may stand outside
        text.setdefault("tie_word_embeddings", config["tie_word_embeddings"])
    record: TextConfig = validated(_TEXTS[family.name], text, "config.json")
    return family, record


def stated_ends(config: Mapping[str, Any]) -> Any:
    """What a config.json's dict says of the tokens that end a text, of a family in our tables checked."""
    if is_tabled(config.get("model_type")):
        return language_config(config)[1].eos_token_id
    text = config.get("text_config")
    return (text if isinstance(text, dict) else config).get("eos_token_id", config.get("eos_token_id"))


def vision_config(config: Mapping[str, Any]) -> VisionConfig | None:
    """The vision tower's record; None for a model without one. Raises CheckpointError."""
    if config.get("model_type") != "llama4" or not config.get("vision_config"):
        return None
    found: VisionConfig = validated(VisionConfig, config["vision_config"], "config.json: vision_config")
    return found


def check_experts(experts: int, top_k: int, layers: int) -> None:
    """Raise CheckpointError unless ``top_k`` of ``experts`` in each of ``layers`` is what a model can be."""
    if experts and layers and not 1 <= top_k <= experts:
        raise CheckpointError(
            f"config.json: num_experts_per_tok is {top_k} of {experts} experts: expected 1 to {experts}"
        )
    if layers * experts > MAX_EXPERTS:
        raise CheckpointError(
            f"config.json describes {layers:,} layers of {experts:,} experts: expected at most "
            f"{MAX_EXPERTS:,} experts in all"
        )
