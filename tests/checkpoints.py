"""Tiny random checkpoints in every family's real key layout, saved by transformers itself.

Small enough to make in a fraction of a second, and with what the big ones have: Scout's chunked and NoPE
layers, Maverick's interleaved dense layers, Llama 4's vision tower and ``language_model.`` prefix, a dense
layer in Qwen3-MoE. Every K is a multiple of 128 unless overridden. Weights are scaled so that logits are of
order 1 and the routers choose clearly and variously; norm weights are near 1 but not 1, so that a norm
that is dropped or applied twice shows.

The ``*_fused`` families hold the same model with the experts of a layer fused, ``mlp.experts.gate_up_proj``
[E, 2·I, H] and ``mlp.experts.down_proj`` [E, H, I] (gate first, then up): what older and third-party
checkpoints look like on disk.

Legend: E experts, H hidden size, I expert intermediate size.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from huggingface_hub import save_torch_state_dict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Llama4Config,
    Llama4ForCausalLM,
    Llama4ForConditionalGeneration,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

Family = Literal[
    "llama4_text",
    "llama4_maverick",
    "llama4",
    "mixtral",
    "qwen3_moe",
    "olmoe",
    "mixtral_fused",
    "qwen3_moe_fused",
    "olmoe_fused",
]
FAMILIES: tuple[Family, ...] = get_args(Family)

_SEED = 20250405
_CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)

# No end-of-text token: greedy text then runs to the asked length whatever the random weights say.
_COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.08,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_LLAMA4_TEXT: dict[str, Any] = _COMMON | {
    "head_dim": 32,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "intermediate_size_mlp": 256,
    "num_local_experts": 8,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
    "no_rope_layer_interval": 4,
    "attention_chunk_size": 32,
    "floor_scale": 32,
}
_LLAMA4_MAVERICK = _LLAMA4_TEXT | {"interleave_moe_layer_step": 2, "use_qk_norm": False}
_LLAMA4_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 128,  # four patches merge into one: 4 times the hidden size
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
    "projector_input_dim": 64,
    "projector_output_dim": 64,
    "vision_output_dim": 64,
}
_MIXTRAL = _COMMON | {
    "head_dim": 32,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
_QWEN3_MOE = _COMMON | {
    "head_dim": 32,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
}
_OLMOE = _COMMON | {"num_key_value_heads": 4, "intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2}

# What ``make`` starts from, by family: config keys of the language model.
BASES: dict[Family, dict[str, Any]] = {
    "llama4_text": _LLAMA4_TEXT,
    "mixtral": _MIXTRAL,
    "qwen3_moe": _QWEN3_MOE,
    "olmoe": _OLMOE,
}


def _llama4(overrides: dict[str, Any]) -> PreTrainedModel:
    vision = _LLAMA4_VISION | overrides.pop("vision_config", {})
    config = Llama4Config(
        text_config=_LLAMA4_TEXT | overrides,
        vision_config=vision,
        image_token_index=250,
        boi_token_index=248,
        eoi_token_index=249,
    )
    return Llama4ForConditionalGeneration(config)


_BUILD: dict[str, Callable[[dict[str, Any]], PreTrainedModel]] = {
    "llama4_text": lambda o: Llama4ForCausalLM(Llama4TextConfig(**_LLAMA4_TEXT | o)),
    "llama4_maverick": lambda o: Llama4ForCausalLM(Llama4TextConfig(**_LLAMA4_MAVERICK | o)),
    "llama4": _llama4,
    "mixtral": lambda o: MixtralForCausalLM(MixtralConfig(**_MIXTRAL | o)),
    "qwen3_moe": lambda o: Qwen3MoeForCausalLM(Qwen3MoeConfig(**_QWEN3_MOE | o)),
    "olmoe": lambda o: OlmoeForCausalLM(OlmoeConfig(**_OLMOE | o)),
}


def make(
    family: Family,
    dst: Path,
    *,
    shards: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = _SEED,
    **overrides: Any,
) -> Path:
    """Save a tiny random checkpoint of ``family``, with a byte tokenizer, under ``dst`` and return ``dst``.

    ``overrides`` are config keys (for ``llama4`` those of its text config, and ``vision_config`` as a dict).
    The same arguments make the same bytes; the caller's random state is left alone. Raises ValueError when
    no shard size spreads the tensors over exactly ``shards`` files.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _BUILD[family.removesuffix("_fused")](dict(overrides)).eval()
        _roughen(model)
    for parameter in model.parameters():  # not model.to(dtype): the vision tower has a complex buffer
        parameter.data = parameter.data.to(dtype)
    _save(model, dst, shards, fused=family.endswith("_fused"))
    byte_tokenizer().save_pretrained(dst)
    return dst


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer without merges or special tokens: token i is one byte, 256 in all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=_CHAT_TEMPLATE)


def _roughen(model: PreTrainedModel) -> None:
    """Norm weights near 1 but not 1, routers whose logits differ by about 2, a head with logits about 1."""
    for name, parameter in model.named_parameters():
        if re.search(r"norm\w*\.weight$", name):
            parameter.data.normal_(1.0, 0.1)
        elif re.search(r"\.(router|mlp\.gate)\.weight$", name):
            parameter.data.normal_(0.0, 2 / parameter.shape[-1] ** 0.5)
        elif name.endswith("embed_tokens.weight"):  # or attention's mean of all tokens makes them alike
            parameter.data.normal_(0.0, 0.5)
        elif name.endswith("lm_head.weight"):
            parameter.data.normal_(0.0, 1 / parameter.shape[-1] ** 0.5)
        elif name.endswith("_proj.bias") and "vision" not in name:
            parameter.data.normal_(0.0, 0.3)


def _save(model: PreTrainedModel, dst: Path, shards: int, *, fused: bool) -> None:
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    for percent in range(100, 200, 5):
        limit = total if shards == 1 else total * percent // (100 * shards)
        for stale in dst.glob("model*.safetensors*"):
            stale.unlink()
        if fused:  # in memory the experts of a layer are fused: written as they are
            model.config.architectures = [type(model).__name__]
            model.config.dtype = model.dtype
            model.config.save_pretrained(dst)
            save_torch_state_dict(model.state_dict(), dst, max_shard_size=limit)
        else:
            model.save_pretrained(dst, max_shard_size=limit)
        if len(list(dst.glob("model*.safetensors"))) == shards:
            return
    raise ValueError(f"no shard size spreads {total} bytes over exactly {shards} files")
