"""What a decoder layer of transformers is made of, for those who run it by other means.

Families differ in names and in a handful of switches; both are read off the loaded modules here, once.
"""

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offload.model.router import Router, router_of
from quant.kernels.attention import AttentionShape, QkNorm, RopeKind
from quant.kernels.routing import Selection
from quant.model.shape import ModelShape

_Q_NORMS = ("q_norm", "query_layernorm", "q_a_layernorm")
_K_NORMS = ("k_norm", "key_layernorm", "kv_a_layernorm")


@dataclass(frozen=True)
class LayerParts:
    """One layer. ``mlp`` is the shared expert of a MoE layer or all of a dense one: a module with gate_proj,
    up_proj and down_proj; ``shared_router`` ``[1, H]`` weighs it, where there is one. ``router`` is None in a dense
    layer, ``sinks`` ``[heads]`` where there are none. Where keys and values are compressed, the projections are those
    that ``quant.kernels.attention`` names."""

    shape: AttentionShape
    q_proj: Any
    k_proj: Any
    v_proj: Any
    o_proj: Any
    q_norm: Tensor | None
    k_norm: Tensor | None
    attention_norm: Tensor
    mlp_norm: Tensor
    eps: float
    mlp: Any
    router: Router | None
    shared_router: Tensor | None = None
    sinks: Tensor | None = None
    q_down: Any = None


def all_layer_parts(model: Any, shape: ModelShape) -> list[LayerParts]:
    """The parts of every layer of transformers' ``model``, whose routers all choose alike. Raises CheckpointError for a
    router that is not understood."""
    found: list[LayerParts] = []
    known: Selection | None = None
    for index, layer in enumerate(model.model.layers):
        found.append(layer_parts(layer, model.config, is_moe=index in shape.moe_layers, selection=known))
        router = found[-1].router
        known = known if router is None else router.selection
    return found


def layer_parts(layer: Any, config: Any, *, is_moe: bool, selection: Selection | None = None) -> LayerParts:
    """The parts of transformers' decoder layer ``layer``; its router chooses by ``selection``, if that is known."""
    attention, block = layer.self_attn, layer.feed_forward if hasattr(layer, "feed_forward") else layer.mlp
    q_norm, k_norm = head_norms(attention)
    sinks, gate = getattr(attention, "sinks", None), getattr(block, "shared_expert_gate", None)
    q_down = getattr(attention, "q_a_proj", None)
    return LayerParts(
        attention_shape(layer, config),
        attention.q_proj if q_down is None else attention.q_b_proj,
        getattr(attention, "k_proj", None) or attention.kv_a_proj_with_mqa,
        getattr(attention, "v_proj", None) or attention.kv_b_proj,
        attention.o_proj,
        None if q_norm is None else q_norm.weight.data,
        None if k_norm is None else k_norm.weight.data,
        layer.input_layernorm.weight.data.float(),
        layer.post_attention_layernorm.weight.data.float(),
        norm_eps(layer.input_layernorm),
        shared_expert(block) if is_moe else block,
        router_of(block, selection) if is_moe else None,
        None if gate is None else gate.weight.data,
        None if sinks is None else sinks.data,
        q_down,
    )


def shared_expert(block: Any) -> Any:
    """The shared expert of a MoE block, however many it is made of; None if there is none."""
    names = ("shared_expert", "shared_experts", "shared_mlp")
    return next((found for name in names if (found := getattr(block, name, None)) is not None), None)


def head_norms(attention: Any) -> tuple[Any, Any]:
    """The norms of queries and keys; None where there are none."""
    found = [
        next((norm for name in names if (norm := getattr(attention, name, None)) is not None), None)
        for names in (_Q_NORMS, _K_NORMS)
    ]
    return found[0], found[1]


def attention_shape(layer: Any, config: Any) -> AttentionShape:
    """What the attention of ``layer`` computes."""
    stock = layer.self_attn
    q_norm, k_norm = head_norms(stock)
    if hasattr(stock, "kv_lora_rank"):
        return AttentionShape(
            heads=stock.num_heads,
            kv_heads=1,
            head_dim=(stock.kv_lora_rank + stock.qk_rope_head_dim) // 2,
            rope="interleaved" if getattr(config, "rope_interleave", True) else "halves",
            eps=norm_eps(layer.input_layernorm),
            qk_eps=norm_eps(k_norm),
            scaling=stock.scaling,
            latent=stock.kv_lora_rank,
            nope=stock.qk_nope_head_dim,
            value_dim=stock.v_head_dim,
        )
    common: dict[str, Any] = {
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": stock.head_dim,
        "eps": norm_eps(layer.input_layernorm),
        "scaling": stock.scaling,
    }
    if hasattr(stock, "use_rope"):  # Llama 4
        rope = bool(stock.use_rope)
        tuned = bool(stock.attn_temperature_tuning) and not rope
        chunked = config.layer_types[stock.layer_idx] == "chunked_attention"
        return AttentionShape(
            **common,
            rope="interleaved" if rope else "none",
            l2_norm=hasattr(stock, "qk_norm"),
            qk_eps=config.rms_norm_eps,
            temperature_floor=float(stock.floor_scale) if tuned else 0.0,
            temperature_scale=float(stock.attn_scale) if tuned else 0.0,
            chunk=config.attention_chunk_size if chunked else 0,
        )
    kind: QkNorm = "none"
    if q_norm is not None:
        kind = "full_width" if q_norm.weight.numel() != stock.head_dim else "per_head"
        # Hunyuan alone norms what RoPE has rotated, and calls its norms otherwise.
        kind = "per_head_after_rope" if hasattr(stock, "query_layernorm") else kind
    window, qk_eps = attention_window(layer, config), norm_eps(q_norm) if q_norm is not None else 1e-5
    return AttentionShape(**common, rope=rope_kind(stock), qk_norm=kind, qk_eps=qk_eps, window=window)


def rope_kind(attention: Any) -> RopeKind:
    """Which pairs of channels RoPE rotates, by what the module's own ``rotate_half`` does."""
    rotate = getattr(sys.modules[type(attention).__module__], "rotate_half", None)
    return "interleaved" if rotate is not None and rotate(torch.arange(4.0)).tolist() == [-1, 0, -3, 2] else "halves"


def attention_window(layer: Any, config: Any) -> int:
    """How many tokens the attention of ``layer`` looks back at, itself included; 0 for all of them.

    Most families keep it in each layer's attention. Mistral and Mixtral keep it in the config alone, where a model of
    another family may carry it without meaning.
    """
    if hasattr(layer.self_attn, "sliding_window"):
        return layer.self_attn.sliding_window or 0
    return (config.sliding_window or 0) if config.model_type in ("mistral", "mixtral") else 0


def norm_eps(norm: Any) -> float:
    """What an RMSNorm adds to the mean square."""
    return float(norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)
