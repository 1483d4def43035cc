"""A tiny checkpoint as a GGUF file, named and stored as llama.cpp's converter does it; names by the gguf package."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, get_tensor_name_map
from gguf.constants import GGML_QUANT_SIZES, MODEL_ARCH
from gguf.quants import dequantize, quantize
from tokenizers import pre_tokenizers
from torch import Tensor

from tests.quant.sources.foreign import Tensors, tensors_of

Kind = GGMLQuantizationType
ARCHITECTURES = {
    "mixtral": MODEL_ARCH.LLAMA,
    "qwen3_moe": MODEL_ARCH.QWEN3MOE,
    "olmoe": MODEL_ARCH.OLMOE,
    "llama4_text": MODEL_ARCH.LLAMA4,
    "llama4_maverick": MODEL_ARCH.LLAMA4,
}
_NAMES = {
    MODEL_ARCH.LLAMA: "llama",
    MODEL_ARCH.QWEN3MOE: "qwen3moe",
    MODEL_ARCH.OLMOE: "olmoe",
    MODEL_ARCH.LLAMA4: "llama4",
}
_EXPERT = re.compile(r"^(.*experts)\.(\d+)\.(\w+)\.weight$")


def write_gguf(
    source: Path,
    path: Path,
    family: str,
    kind: Kind = Kind.BF16,
    *,
    split: int = 0,
    edit: Callable[[GGUFWriter], object] = id,
) -> Tensors:
    """Write the checkpoint ``source`` to ``path`` with every matrix but routers in ``kind`` (random blocks where the
    package cannot quantize to it), with at most ``split`` tensors to a file. Returns what each tensor stands for."""
    config, architecture = json.loads((source / "config.json").read_text()), ARCHITECTURES[family]
    writer = GGUFWriter(path, _NAMES[architecture], split_max_tensors=split)
    _write_metadata(writer, config)
    edit(writer)
    names = get_tensor_name_map(architecture, config["num_hidden_layers"])
    meant: Tensors = {}
    for key, value in _stacked(tensors_of(source)).items():
        name = names.get_name(key, try_suffixes=(".weight",))
        assert name is not None, key
        heads = config["num_attention_heads" if "q_proj" in key else "num_key_value_heads"]
        turned = family == "mixtral" and key.endswith(("q_proj.weight", "k_proj.weight"))
        data = (_turned(value, heads) if turned else value).float().numpy()
        used = Kind.F32 if data.ndim == 1 or "ffn_gate_inp" in name else kind
        stored = _quantized(data, used)
        found = torch.from_numpy(np.asarray(dequantize(stored, used), np.float32)).view(value.shape)
        meant[key] = _turned_back(found, heads) if turned else found
        writer.add_tensor(name, stored, raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dict(_unstacked(meant, source))


def _write_metadata(writer: GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base((config.get("rope_parameters") or {}).get("rope_theta", 10000.0))
    writer.add_expert_count(config.get("num_local_experts") or config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config.get("moe_intermediate_size", config["intermediate_size"]))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet[:255], "he"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256)
    writer.add_token_merges(["h e"])


def _stacked(tensors: Tensors) -> Tensors:
    """The experts of a layer as one tensor, as the converter hands them to the name map."""
    made: dict[str, Any] = {}
    for key, value in tensors.items():
        found = _EXPERT.match(key)
        if found:
            made.setdefault(f"{found[1]}.{found[3]}.weight", {})[int(found[2])] = value
        elif key.endswith(("experts.gate_up_proj", "experts.down_proj")):  # Llama 4's, transposed
            base, halves = key.rpartition(".")[0], value.transpose(1, 2).chunk(2 if "gate_up" in key else 1, 1)
            names = ("gate_proj", "up_proj") if "gate_up" in key else ("down_proj",)
            made |= {f"{base}.{name}.weight": half for name, half in zip(names, halves, strict=True)}
        else:
            made[key] = value
    return {
        key: torch.stack([value[i] for i in range(len(value))]) if isinstance(value, dict) else value
        for key, value in made.items()
    }


def _unstacked(meant: Tensors, source: Path) -> Any:
    for key, value in meant.items():
        if value.dim() == 3:
            base, _, name = key.removesuffix(".weight").rpartition(".")
            yield from ((f"{base}.{i}.{name}.weight", value[i]) for i in range(len(value)))
        else:
            yield key, value


def _quantized(data: Any, kind: Kind) -> Any:
    try:
        return quantize(np.ascontiguousarray(data), kind)
    except NotImplementedError:
        block, size = GGML_QUANT_SIZES[kind]
        random = np.random.default_rng(0)
        return random.integers(0, 60, (*data.shape[:-1], data.shape[-1] // block * size), dtype=np.uint8)


def _turned(weight: Tensor, heads: int) -> Tensor:
    """Rows in llama.cpp's order."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _turned_back(weight: Tensor, heads: int) -> Tensor:
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
