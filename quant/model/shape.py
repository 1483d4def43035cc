"""ModelShape: the numbers of one config.json, and every tensor a checkpoint of that shape has.

Planning, synthesis and conversion all count from here, so that they cannot disagree. Pure Python.
"""

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quant.errors import DenseModelError
from quant.model.config import check_experts, language_config, vision_config
from quant.model.families import PROJECTIONS, Family, Projection, Role, TensorName, parse_name
from quant.model.mixed_precision import MixedPrecision, scheme_of
from quant.model.tensors import FusedForm, LinearSpec, TensorSpec
from quant.model.text_config import Llama4Text, MixtralText, OlmoeText, Qwen3MoeText, TextConfig, VisionConfig
from quant.model.vision import tower_linears
from quant.scheme import BF16, Scheme
from quant.sizes import KV_PAGE_TOKENS

_CONTEXT = 4096


@dataclass(frozen=True)
class ModelShape:
    """The dimensions of a Mixture-of-Experts language model, family and names included.

    ``moe_layers`` are the layers that route; ``dense_intermediate`` is the width of the others' MLP (0 if
    there are none) and ``shared_intermediate`` that of the shared expert (0 if there is none).
    ``chunked_layers`` attend within chunks of ``attention_chunk_size`` tokens only, which bounds their KV
    cache. Where attention compresses keys and values (MLA), ``latent`` channels of a token are what all heads' are made
    of, and ``head_dim`` is half of all that is kept of it. ``vision_weights`` counts the vision tower's and projector's
    parameters (0 for text-only). ``grows_to`` is how long a context may be that nobody asked for; 0: as ``context()``
    says, for transformers computes attention.
    """

    family: Family
    model_type: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    expert_intermediate: int
    shared_intermediate: int
    dense_intermediate: int
    chunked_layers: tuple[int, ...]
    attention_chunk_size: int
    tie_word_embeddings: bool
    max_position_embeddings: int
    prefix: str = ""
    head_norms: tuple[int, int] = (0, 0)
    vision_weights: int = 0
    attention_bias: bool = False
    grows_to: int = 0
    vision_tower: VisionConfig | None = None
    latent: int = 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ModelShape":
        """Read a config.json's dict. Raises UnknownFamilyError, or CheckpointError naming a key that is missing
        or wrong, or saying that the model has no experts."""
        family, text = language_config(config)
        shape = _of_record(family, str(config["model_type"]), text, vision_config(config))
        if not shape.moe_layers:
            raise DenseModelError(
                f"config.json describes a dense {family.name} model, no layer of which routes to experts: Coldstream "
                "runs Mixture-of-Experts models, dense ones are not supported yet"
            )
        return shape

    @property
    def expert_weights(self) -> int:
        """Weights of one routed expert."""
        return 3 * self.hidden_size * self.expert_intermediate

    @property
    def is_multimodal(self) -> bool:
        return self.vision_weights > 0

    @property
    def reads_images(self) -> bool:
        """Whether a run can look at images: one of a family that our tables have, with a tower."""
        return self.is_multimodal and self.is_native

    @property
    def is_native(self) -> bool:
        """Whether our tables name the family's parts: the kernels then compute whole layers, on any device."""
        return True

    @property
    def layers_on_cpu(self) -> bool:
        """Whether the CPU's kernels compute whole layers: attention, router and shared expert as well."""
        return True

    @property
    def keeps_pages(self) -> bool:
        """Whether attention keeps keys and values and nothing else, every layer alike: then in pages of our own."""
        return True

    @property
    def expert_bias(self) -> bool:
        """Whether the Linears of an expert have biases."""
        return False

    @property
    def merges_experts(self) -> bool:
        """Whether transformers merges one tensor per expert into its own while it loads."""
        return not self.family.fused_transposed

    @property
    def turns_experts(self) -> bool:
        """Whether transformers turns fused experts round that a file holds the other way."""
        return False

    @property
    def towers(self) -> tuple[str, ...]:
        """What the names of modules that see or hear have in common."""
        return ("vision_model", "multi_modal_projector") if self.is_multimodal else ()

    @property
    def embedding_module(self) -> str:
        """Checkpoint module name of the embeddings."""
        return f"{self.prefix}model.embed_tokens"

    def runtime_name(self, module: str) -> str:
        """The name in transformers' language model of checkpoint module ``module``."""
        family = self.family
        return module.removeprefix(self.prefix).replace(f".{family.block}.", f".{family.runtime_block}.")

    def parse_name(self, key: str) -> TensorName | None:
        """What checkpoint key ``key`` is; None for a key that the model does not explain."""
        return parse_name(self.family, key)

    def place(self, key: str) -> Hashable:
        """What ``key`` and every other name for the same tensor have in common."""
        block, runtime = self.family.block, self.family.runtime_block
        return key.replace(f".{block}.", f".{runtime}.")

    def saved_key(self, key: str) -> str:
        """The key that a quantized checkpoint gives the tensor that its source calls ``key``: the family's name for
        its MoE block where that is a router's."""
        name = self.parse_name(key)
        if name is None or name.role != "router":
            return key
        return key.replace(f".{self.family.runtime_block}.", f".{self.family.block}.")

    def is_ignored(self, key: str) -> bool:
        """Whether ``key`` is of a part that transformers leaves out of the model: layers that draft tokens, say."""
        return False

    def fused_form(self, layer: int) -> FusedForm:
        """How tensors that hold all experts of ``layer`` lie in a source checkpoint."""
        base = f"{self.layer_prefix(layer)}{self.family.runtime_block}.experts."
        return FusedForm(base, self.family.fused_transposed, False, False)

    def expert_nbytes(self, scheme: Scheme) -> int:
        """Bytes of one routed expert's three projections under ``scheme``, and of their biases in bf16."""
        up = scheme.nbytes(self.expert_intermediate, self.hidden_size)
        return 2 * up + scheme.nbytes(self.hidden_size, self.expert_intermediate) + self._bias_nbytes

    @property
    def _bias_nbytes(self) -> int:
        return 2 * (2 * self.expert_intermediate + self.hidden_size) if self.expert_bias else 0

    def experts_nbytes(self, schemes: Mapping[Role, Scheme]) -> int:
        """Bytes of all routed experts."""
        if not isinstance(schemes, MixedPrecision):
            one = self.expert_nbytes(schemes.get("experts", BF16))
            return one * self.num_experts * len(self.moe_layers)
        return sum(self.expert_sizes(schemes))

    def largest_expert(self, schemes: Mapping[Role, Scheme]) -> int:
        """Bytes of the largest routed expert."""
        if not isinstance(schemes, MixedPrecision):
            return self.expert_nbytes(schemes.get("experts", BF16))
        return max(self.expert_sizes(schemes), default=0)

    def expert_sizes(self, schemes: Mapping[Role, Scheme]) -> Iterator[int]:
        """Bytes of every routed expert, layer after layer."""
        for layer in self.moe_layers:
            for expert in range(self.num_experts):
                linears = self.expert_linears(layer, expert)
                yield self._bias_nbytes + sum(
                    scheme_of(schemes, x).nbytes(x.out_features, x.in_features) for x in linears
                )

    def context(self, asked: int | None = None) -> int:
        """Tokens that a run plans for at least: those asked for, else 4,096 or all that the model was made for."""
        return asked or min(_CONTEXT, self.max_position_embeddings or _CONTEXT)

    def kv_layers(self, context: int) -> Iterator[tuple[int, int]]:
        """(layer, tokens its KV cache must hold) for a context of ``context`` tokens."""
        for layer in range(self.num_layers):
            chunked = layer in self.chunked_layers
            yield layer, min(context, self.attention_chunk_size) if chunked else context

    def kv_pages(self, context: int) -> int:
        """Pages that the KV cache of ``context`` tokens takes: a chunk that begins within one needs one more."""
        pages = 0
        for _, tokens in self.kv_layers(context):
            astride = tokens < context and self.attention_chunk_size % KV_PAGE_TOKENS > 0
            pages += min(-(-tokens // KV_PAGE_TOKENS) + astride, -(-context // KV_PAGE_TOKENS))
        return pages

    def kv_nbytes(self, context: int, bytes_per_value: float = 2) -> int:
        """Bytes of the KV cache for ``context`` tokens of one sequence."""
        tokens = sum(count for _, count in self.kv_layers(context))
        return int(tokens * 2 * self.num_kv_heads * self.head_dim * bytes_per_value)

    def layer_prefix(self, layer: int) -> str:
        return f"{self.prefix}model.layers.{layer}."

    def expert_module(self, layer: int, expert: int, projection: Projection) -> str:
        """Checkpoint module name of one expert's projection."""
        block = f"{self.layer_prefix(layer)}{self.family.block}.experts.{expert}."
        return block + self.family.projection(projection)

    def expert_linears(self, layer: int, expert: int) -> Iterator[LinearSpec]:
        """The three Linears of one routed expert, in stored order: gate_proj, up_proj, down_proj."""
        hidden, inter = self.hidden_size, self.expert_intermediate
        for projection in PROJECTIONS:
            rows, columns = (hidden, inter) if projection == "down_proj" else (inter, hidden)
            module = self.expert_module(layer, expert, projection)
            yield LinearSpec(module, "experts", rows, columns, layer, expert, projection)

    def dense_linears(self) -> Iterator[LinearSpec]:
        """Every quantizable Linear that is not a routed expert, in model order; lm_head last."""
        hidden = self.hidden_size
        for layer in range(self.num_layers):
            base = self.layer_prefix(layer)
            query, key = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
            sizes = {"q_proj": query, "k_proj": key, "v_proj": key}
            projections = [(name, rows, hidden) for name, rows in sizes.items()] + [("o_proj", hidden, query)]
            for name, rows, columns in projections:
                yield LinearSpec(f"{base}self_attn.{name}", "attention", rows, columns, layer)
            if layer not in self.moe_layers:
                mlp = f"{base}{self.family.runtime_block}."
                yield from self._mlp(mlp, "dense_mlp", self.dense_intermediate, layer)
            elif self.shared_intermediate and self.family.shared_expert:
                shared = f"{base}{self.family.block}.{self.family.shared_expert}."
                yield from self._mlp(shared, "shared_expert", self.shared_intermediate, layer)
        if not self.tie_word_embeddings:
            yield LinearSpec(f"{self.prefix}lm_head", "lm_head", self.vocab_size, hidden)

    def _mlp(self, base: str, role: Role, inter: int, layer: int) -> Iterator[LinearSpec]:
        for projection in PROJECTIONS:
            rows, columns = (self.hidden_size, inter) if projection == "down_proj" else (inter, self.hidden_size)
            yield LinearSpec(base + projection, role, rows, columns, layer, None, projection)

    def vision_linears(self) -> Iterator[LinearSpec]:
        """The quantizable Linears of the vision tower and its projector; none where our tables have no tower."""
        if self.vision_tower is not None:
            yield from tower_linears(self.vision_tower, self.hidden_size)

    def linears(self) -> Iterator[LinearSpec]:
        """Every quantizable Linear: the dense ones, the tower's, then all experts layer by layer."""
        yield from self.dense_linears()
        yield from self.vision_linears()
        for layer in self.moe_layers:
            for expert in range(self.num_experts):
                yield from self.expert_linears(layer, expert)

    def plain_tensors(self) -> Iterator[TensorSpec]:
        """Every text tensor that is never quantized: embeddings, routers, norms."""
        hidden = self.hidden_size
        yield TensorSpec(f"{self.prefix}model.embed_tokens.weight", "embeddings", (self.vocab_size, hidden))
        for layer in range(self.num_layers):
            base = self.layer_prefix(layer)
            yield TensorSpec(f"{base}input_layernorm.weight", "norm", (hidden,), layer)
            yield TensorSpec(f"{base}post_attention_layernorm.weight", "norm", (hidden,), layer)
            for name, width in zip(("q_norm", "k_norm"), self.head_norms, strict=True):
                if width:
                    yield TensorSpec(f"{base}self_attn.{name}.weight", "norm", (width,), layer)
            if layer in self.moe_layers:
                router = f"{base}{self.family.block}.{self.family.router}.weight"
                yield TensorSpec(router, "router", (self.num_experts, hidden), layer)
        yield TensorSpec(f"{self.prefix}model.norm.weight", "norm", (hidden,))

    def role_nbytes(self, schemes: Mapping[Role, Scheme]) -> dict[Role, int]:
        """Bytes of the whole checkpoint by role; a role that ``schemes`` does not name is bf16."""
        total: dict[Role, int] = {}
        tower, others = list(self.vision_linears()), self.vision_weights
        for linear in (*self.dense_linears(), *tower):
            nbytes = scheme_of(schemes, linear).nbytes(linear.out_features, linear.in_features)
            total[linear.role] = total.get(linear.role, 0) + nbytes
        for tensor in self.plain_tensors():
            total[tensor.role] = total.get(tensor.role, 0) + tensor.elements * 2
        total["experts"] = self.experts_nbytes(schemes)
        if others:
            total["vision"] = total.get("vision", 0) + 2 * (others - sum(linear.weights for linear in tower))
        return total


def _of_record(family: Family, model_type: str, text: TextConfig, vision: VisionConfig | None) -> ModelShape:
    layers, hidden, inter = text.num_hidden_layers, text.hidden_size, text.intermediate_size
    moe_layers, expert_inter, shared, dense, norms = tuple(range(layers)), inter, 0, 0, (0, 0)
    chunked: tuple[int, ...] = ()
    chunk = 0
    if isinstance(text, Llama4Text):
        moe_layers = text.routed_layers
        shared, dense = inter, text.intermediate_size_mlp
        chunked, chunk = text.chunked_layers, text.attention_chunk_size
    elif isinstance(text, Qwen3MoeText):
        plain = set(text.mlp_only_layers or ())
        moe_layers = tuple(i for i in range(layers) if i not in plain and (i + 1) % text.decoder_sparse_step == 0)
        expert_inter, dense, norms = text.moe_intermediate_size, inter, (text.head_size, text.head_size)
    elif isinstance(text, OlmoeText):
        norms = (hidden, text.key_value_heads * text.head_size)
    experts, top_k = text.experts, text.num_experts_per_tok
    moe_layers = moe_layers if experts else ()
    check_experts(experts, top_k, len(moe_layers))
    return ModelShape(
        family=family,
        model_type=model_type,
        hidden_size=hidden,
        num_layers=layers,
        vocab_size=text.vocab_size,
        num_heads=text.num_attention_heads,
        num_kv_heads=text.key_value_heads,
        head_dim=text.head_size,
        moe_layers=moe_layers,
        num_experts=experts,
        top_k=top_k,
        expert_intermediate=expert_inter,
        shared_intermediate=shared,
        dense_intermediate=dense if len(moe_layers) < layers else 0,
        chunked_layers=chunked,
        attention_chunk_size=chunk if chunked else 0,
        tie_word_embeddings=text.tie_word_embeddings,
        max_position_embeddings=text.max_position_embeddings,
        prefix="language_model." if model_type == "llama4" else "",
        head_norms=norms,
        vision_weights=0 if vision is None else vision.weights(hidden),
        attention_bias=text.attention_bias and not isinstance(text, MixtralText),
        vision_tower=vision,
        grows_to=text.grows_to,
    )
