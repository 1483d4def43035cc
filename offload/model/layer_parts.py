"""What a decoder layer of transformers is made of, for those who run it by other means.

Families differ in names and in a handful of switches; both are read off the loaded modules here, once.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from quant.kernels.attention import AttentionShape
from quant.kernels.moe import RouterKind
from quant.model.shape import ModelShape


@dataclass(frozen=True)
class LayerParts:
    """One layer. ``mlp`` is the shared expert of a MoE layer or all of a dense one: a module with gate_proj,
    up_proj and down_proj; ``router`` ``[E, H]`` is None in a dense layer, ``router_bias`` ``[E]`` and ``sinks``
    ``[heads]`` where there are none."""

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
    router: Tensor | None
    router_kind: RouterKind
    top_k: int
    router_bias: Tensor | None = None
    sinks: Tensor | None = None


def all_layer_parts(model: Any, shape: ModelShape) -> list[LayerParts]:
    """The parts of every layer of transformers' ``model``."""
    layers = enumerate(model.model.layers)
    return [layer_parts(layer, model.config, is_moe=index in shape.moe_layers) for index, layer in layers]


def layer_parts(layer: Any, config: Any, *, is_moe: bool) -> LayerParts:
    """The parts of transformers' decoder layer ``layer``."""
    attention, block = layer.self_attn, layer.feed_forward if hasattr(layer, "feed_forward") else layer.mlp
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    kind, top_k = router_kind(layer) if is_moe else ("softmax", 0)
    bias, sinks = getattr(router_of(layer), "bias", None) if is_moe else None, getattr(attention, "sinks", None)
    return LayerParts(
        attention_shape(layer, config),
        attention.q_proj,
        attention.k_proj,
        attention.v_proj,
        attention.o_proj,
        None if q_norm is None else q_norm.weight.data,
        None if k_norm is None else k_norm.weight.data,
        layer.input_layernorm.weight.data.float(),
        layer.post_attention_layernorm.weight.data.float(),
        norm_eps(layer.input_layernorm),
        getattr(block, "shared_expert", None) if is_moe else block,
        router_weight(layer).data if is_moe else None,
        kind,
        top_k,
        None if bias is None else bias.data,
        None if sinks is None else sinks.data,
    )


def attention_shape(layer: Any, config: Any) -> AttentionShape:
    """What the attention of ``layer`` computes."""
    stock = layer.self_attn
    q_norm = getattr(stock, "q_norm", None)
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
    per_head = q_norm is not None and q_norm.weight.numel() == stock.head_dim
    kind = "none" if q_norm is None else "per_head" if per_head else "full_width"
    window = attention_window(layer, config)
    qk_eps = norm_eps(q_norm) if q_norm is not None else 1e-5
    return AttentionShape(**common, rope="halves", qk_norm=kind, qk_eps=qk_eps, window=window)  # type: ignore[arg-type]


def attention_window(layer: Any, config: Any) -> int:
    """How many tokens the attention of ``layer`` looks back at, itself included; 0 for all of them.

    Most families keep it in each layer's attention. Mistral and Mixtral keep it in the config alone, where a model of
    another family may carry it without meaning.
    """
    if hasattr(layer.self_attn, "sliding_window"):
        return layer.self_attn.sliding_window or 0
    return (config.sliding_window or 0) if config.model_type in ("mistral", "mixtral") else 0


def router_kind(layer: Any) -> tuple[RouterKind, int]:
    """How the router of a MoE layer scores, and how many experts it chooses."""
    if hasattr(layer, "feed_forward"):  # Llama 4
        return "sigmoid_input", int(layer.feed_forward.top_k)
    router = router_of(layer)
    normalized = getattr(router, "norm_topk_prob", True)
    return "softmax_normalized" if normalized else "softmax", int(router.top_k)


def router_of(layer: Any) -> Any:
    """The router of a MoE layer."""
    block = layer.feed_forward if hasattr(layer, "feed_forward") else layer.mlp
    return block.router if hasattr(block, "router") else block.gate


def router_weight(layer: Any) -> Any:
    """The router's parameter ``[E, H]``."""
    return router_of(layer).weight


def norm_eps(norm: Any) -> float:
    """What an RMSNorm adds to the mean square."""
    return float(norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)
