"""The keys that a language model of each family is built from, as typed records.

Absent keys have the defaults of transformers' own config classes. Keys that no model code reads
(``architectures``, ``auto_map``, ``id2label`` …) are not here: they are ignored, and never passed on.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

ANY_CHUNK = 8192  # where no layer is chunked: transformers wants a number even where nobody reads it

# Bounds that no published model comes near, and within which planning takes seconds and megabytes.
MAX_LAYERS = 1024
_Layers = Annotated[int, Field(ge=1, le=MAX_LAYERS)]
_Heads = Annotated[int, Field(ge=1, le=2**14)]
_HeadDim = Annotated[int, Field(ge=2, le=2**14, multiple_of=2)]  # rotary embedding turns pairs
_Width = Annotated[int, Field(ge=1, le=2**22)]
_Vocabulary = Annotated[int, Field(ge=1, le=2**26)]
_Experts = Annotated[int, Field(ge=0, le=2**14)]
_Tokens = Annotated[int, Field(ge=1, le=2**34)]
_Count = Annotated[int, Field(ge=0, le=2**14)]
_LayerList = Annotated[list[_Count], Field(max_length=MAX_LAYERS)]
_TokenId = Annotated[int, Field(ge=-1, le=2**26)]
_Real = Annotated[float, Field(allow_inf_nan=False)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_AttentionKinds = Annotated[
    list[Literal["chunked_attention", "full_attention"]], Field(min_length=1, max_length=MAX_LAYERS)
]
_Factors = Annotated[list[_Positive], Field(max_length=2**14)]
MAX_EXPERTS = 2**17  # in all layers


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class Rope(_Record):
    """How rotary embeddings are scaled, by transformers' names (``modeling_rope_utils``)."""

    rope_type: Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3"] = "default"
    rope_theta: _Positive | None = None
    factor: Annotated[float, Field(ge=1, le=2**20)] | None = None
    original_max_position_embeddings: _Tokens | None = None
    low_freq_factor: _Positive | None = None
    high_freq_factor: _Positive | None = None
    attention_factor: _Positive | None = None
    beta_fast: _Positive | None = None
    beta_slow: _Positive | None = None
    mscale: _Real | None = None
    mscale_all_dim: _Real | None = None
    truncate: bool | None = None
    short_factor: _Factors | None = None
    long_factor: _Factors | None = None
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _by_its_old_name(cls, data: Any) -> Any:
        if isinstance(data, dict) and "type" in data:
            return {"rope_type": data["type"], **data}
        return data

    @model_validator(mode="after")
    def _has_what_its_type_needs(self) -> "Rope":
        for name in _ROPE_NEEDS[self.rope_type]:
            if getattr(self, name) is None:
                raise ValueError(f"has no {name}: expected it for rope_type {self.rope_type!r}")
        return self


_ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}


class TextConfig(_Record):
    """What all families have. ``experts`` is the number of routed experts in a layer that routes."""

    hidden_size: _Width
    num_hidden_layers: _Layers
    num_attention_heads: _Heads
    num_key_value_heads: _Heads | None = None
    head_dim: _HeadDim | None = None
    intermediate_size: _Width
    vocab_size: _Vocabulary
    max_position_embeddings: _Tokens
    num_experts_per_tok: _Experts
    hidden_act: Literal["silu"] = "silu"
    rms_norm_eps: Annotated[float, Field(ge=0, lt=1)]
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    rope_parameters: Rope | None = None
    rope_scaling: Rope | None = None
    rope_theta: _Positive | None = None
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] | None = None
    bos_token_id: _TokenId | None = None
    eos_token_id: _TokenId | list[_TokenId] | None = None

    @property
    def experts(self) -> int:
        """Routed experts in each layer that routes."""
        raise NotImplementedError

    @property
    def grows_to(self) -> int:
        """See ModelShape: RoPE of two kinds changes within a text, and who clips q, k and v is left to transformers."""
        rope = self.rope_parameters or self.rope_scaling
        changes = rope is not None and rope.rope_type in ("dynamic", "longrope")
        return 0 if changes or getattr(self, "clip_qkv", None) else self.max_position_embeddings

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Width of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @model_validator(mode="after")
    def _heads_agree(self) -> "TextConfig":
        if self.num_attention_heads % self.key_value_heads:
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads}: expected a multiple of num_key_value_heads, "
                f"{self.key_value_heads}"
            )
        if self.head_dim is None and self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size is {self.hidden_size}: expected a multiple of twice num_attention_heads, "
                f"{self.num_attention_heads}, or a head_dim"
            )
        return self

    def for_transformers(self) -> dict[str, Any]:
        """The keys that were given, for transformers' config class."""
        given = self.model_dump(exclude_unset=True)
        given["pad_token_id"] = None  # nothing is padded, and stock demands that it be in the vocabulary
        for name, value in (("num_key_value_heads", self.key_value_heads), ("head_dim", self.head_size)):
            if name in given:
                given[name] = value
        for name in ("rope_parameters", "rope_scaling"):
            rope: Rope | None = getattr(self, name)
            if rope is not None:
                given[name] = rope.model_dump(exclude_unset=True, exclude_none=True)
        return {name: value for name, value in given.items() if value is not None or name not in _NULL_IS_ABSENT}


_NULL_IS_ABSENT = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")


class _LocalExperts(TextConfig):
    @model_validator(mode="before")
    @classmethod
    def _by_either_name(cls, data: Any) -> Any:
        return _renamed(data, "num_experts", "num_local_experts")


class _PlainExperts(TextConfig):
    @model_validator(mode="before")
    @classmethod
    def _by_either_name(cls, data: Any) -> Any:
        return _renamed(data, "num_local_experts", "num_experts")


class MixtralText(_LocalExperts):
    """Mixtral: every layer routes."""

    num_key_value_heads: _Heads | None = 8
    max_position_embeddings: _Tokens = 4096 * 32
    rms_norm_eps: Annotated[float, Field(ge=0, lt=1)] = 1e-5
    num_local_experts: _Experts = 8
    num_experts_per_tok: _Experts = 2
    sliding_window: _Tokens | None = None

    @property
    def experts(self) -> int:
        return self.num_local_experts


class Qwen3MoeText(_PlainExperts):
    """Qwen3-MoE: layers are dense by a step or by name."""

    num_key_value_heads: _Heads | None = 4
    max_position_embeddings: _Tokens = 32768
    rms_norm_eps: Annotated[float, Field(ge=0, lt=1)] = 1e-6
    num_experts: _Experts = 128
    num_experts_per_tok: _Experts = 8
    moe_intermediate_size: _Width = 768
    decoder_sparse_step: Annotated[int, Field(ge=1, le=MAX_LAYERS)] = 1
    mlp_only_layers: _LayerList | None = None
    norm_topk_prob: bool = False
    use_sliding_window: bool = False
    sliding_window: _Tokens | None = 4096

    @property
    def experts(self) -> int:
        return self.num_experts


class OlmoeText(_PlainExperts):
    """OLMoE: every layer routes, norms over the whole width of queries and keys."""

    max_position_embeddings: _Tokens = 4096
    rms_norm_eps: Annotated[float, Field(ge=0, lt=1)] = 1e-5
    num_experts: _Experts = 64
    num_experts_per_tok: _Experts = 8
    norm_topk_prob: bool = False
    clip_qkv: _Positive | None = None

    @property
    def experts(self) -> int:
        return self.num_experts


class Llama4Text(_LocalExperts):
    """Llama 4's language model: layers route by name or by a step, attend in chunks or at full length."""

    num_key_value_heads: _Heads | None = 8
    head_dim: _HeadDim | None = 128
    max_position_embeddings: _Tokens = 4096 * 32
    rms_norm_eps: Annotated[float, Field(ge=0, lt=1)] = 1e-5
    intermediate_size_mlp: _Width = 16384
    num_local_experts: _Experts = 16
    num_experts_per_tok: _Experts = 1
    moe_layers: _LayerList | None = None
    interleave_moe_layer_step: _Count = 1
    use_qk_norm: bool = True
    no_rope_layers: _LayerList | None = None
    no_rope_layer_interval: Annotated[int, Field(ge=1, le=MAX_LAYERS)] = 4
    attention_chunk_size: _Tokens = ANY_CHUNK
    layer_types: (
        Annotated[list[Literal["chunked_attention", "full_attention"]], Field(min_length=1, max_length=MAX_LAYERS)]
        | None
    ) = None
    attn_temperature_tuning: bool = True
    floor_scale: Annotated[int, Field(ge=1, le=2**31)] = 8192
    attn_scale: _Real = 0.1

    @property
    def experts(self) -> int:
        return self.num_local_experts

    @property
    def routed_layers(self) -> tuple[int, ...]:
        """The layers that route."""
        if self.moe_layers is not None:
            return tuple(sorted(set(self.moe_layers)))
        step = self.interleave_moe_layer_step
        return tuple(range(step - 1, self.num_hidden_layers, step))

    @property
    def chunked_layers(self) -> tuple[int, ...]:
        """The layers that attend in chunks."""
        if self.layer_types is not None:
            return tuple(i for i, kind in enumerate(self.layer_types) if kind == "chunked_attention")
        layers = self.num_hidden_layers
        rope = self.no_rope_layers or [int((i + 1) % self.no_rope_layer_interval != 0) for i in range(layers)]
        return tuple(i for i, uses_rope in enumerate(rope[:layers]) if uses_rope)

    @model_validator(mode="after")
    def _lists_fit_the_layers(self) -> "Llama4Text":
        layers = self.num_hidden_layers
        if self.layer_types is not None and len(self.layer_types) != layers:
            raise ValueError(f"layer_types names {len(self.layer_types)} layers: expected {layers}")
        if self.no_rope_layers and len(self.no_rope_layers) < layers:
            raise ValueError(f"no_rope_layers names {len(self.no_rope_layers)} layers: expected {layers}")
        if self.moe_layers is None and not self.interleave_moe_layer_step:
            raise ValueError("interleave_moe_layer_step is 0: expected 1 or more, or moe_layers")
        if self.moe_layers is not None and any(layer >= layers for layer in self.moe_layers):
            raise ValueError(f"moe_layers names layer {max(self.moe_layers)}: the model has {layers}")
        return self


class VisionConfig(_Record):
    """Llama 4's vision tower, as far as its size goes."""

    hidden_size: _Width = 768
    num_hidden_layers: Annotated[int, Field(ge=0, le=MAX_LAYERS)] = 34
    num_attention_heads: Annotated[int, Field(ge=1, le=2**10)] = 16
    num_channels: Annotated[int, Field(ge=1, le=64)] = 3
    intermediate_size: _Width = 5632
    vision_output_dim: _Width = 7680
    image_size: Annotated[int, Field(ge=1, le=2**16)] = 448
    patch_size: Annotated[int, Field(ge=1, le=2**16)] = 14
    projector_input_dim: _Width = 4096
    projector_output_dim: _Width = 4096

    def weights(self, hidden: int) -> int:
        """Parameters of the tower and its projector to a language model of width ``hidden`` (transformers'
        ``Llama4VisionModel``, its Linears, norms and biases)."""
        width, inter = self.hidden_size, self.intermediate_size
        patch = self.patch_size**2 * self.num_channels
        positions = (self.image_size // self.patch_size) ** 2 + 1
        layer = 4 * (width * width + width) + 2 * width * inter + inter + width + 4 * width
        adapter = inter * self.projector_input_dim + self.projector_output_dim**2
        outer = patch * width + width + positions * width + 4 * width
        return self.num_hidden_layers * layer + adapter + outer + self.vision_output_dim * hidden


def _renamed(data: Any, other: str, name: str) -> Any:
    """``data`` with the number of experts under ``name``, wherever it stood. A null is no number."""
    if not isinstance(data, dict) or data.get(other) is None:
        return data
    if data.get(name) not in (None, data[other]):
        raise ValueError(f"{name} is {data[name]!r} and {other} is {data[other]!r}: expected the same number")
    return {**data, name: data[other]}
