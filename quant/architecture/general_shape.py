"""GeneralShape: the ModelShape of a family that Coldstream has no table for, read off transformers' own model."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from quant.architecture.checkpoint_names import Place
from quant.architecture.structure import Structure, structure_of
from quant.errors import CheckpointError
from quant.model.families import CPU_LAYERS, PROJECTIONS, Family, Projection, Role, TensorName
from quant.model.shape import ModelShape
from quant.model.tensors import FusedForm, LinearSpec, TensorSpec
from quant.sizes import KV_PAGE_TOKENS


@dataclass(frozen=True)
class GeneralShape(ModelShape):
    """A model of any family that transformers knows; dense ones have no ``moe_layers``."""

    structure: Structure = field(repr=False, compare=False, kw_only=True)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "GeneralShape":
        """Read a config.json's dict. Raises UnknownFamilyError or CheckpointError, naming what is not understood."""
        found = structure_of(config)
        text, experts = found.text, list(found.experts.values())
        sizes = {(one.count, one.hidden, one.intermediate) for one in experts}
        choices = {found.step.top_k[one.module] for one in experts}
        kind = str(config["model_type"])
        if len(sizes) > 1 or len(choices) > 1:
            raise CheckpointError(f"a {kind} model whose layers have different experts is not supported")
        count, _, inter = sizes.pop() if sizes else (0, 0, 0)
        if experts and not 1 <= max(choices) <= count:
            raise CheckpointError(f"config.json: each token takes {max(choices)} of {count} experts")
        heads = int(getattr(text, "num_attention_heads", None) or 1)
        widths: dict[Role, int] = {}
        for linear in found.linears:
            narrow = min(linear.out_features, linear.in_features)
            widths[linear.role] = max(widths.get(linear.role, 0), narrow)
        kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
        head_dim, latent = int(getattr(text, "head_dim", None) or max(1, text.hidden_size // heads)), 0
        kept = {(cache.heads, cache.width, cache.value_width) for cache in found.step.caches}
        if kind in CPU_LAYERS and len(kept) == 1 and (only := kept.pop())[1] != only[2]:
            kv_heads, head_dim, latent = only[0], (only[1] + only[2]) // 2, only[1]
        return cls(
            family=Family(kind, (kind,), "", "", ""),
            model_type=kind,
            hidden_size=int(text.hidden_size),
            num_layers=int(text.num_hidden_layers),
            vocab_size=int(text.vocab_size),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            latent=latent,
            moe_layers=tuple(found.experts),
            num_experts=count,
            top_k=max(choices, default=0),
            expert_intermediate=inter,
            shared_intermediate=widths.get("shared_expert", 0),
            dense_intermediate=widths.get("dense_mlp", 0),
            chunked_layers=(),
            attention_chunk_size=0,
            tie_word_embeddings=found.tied,
            max_position_embeddings=int(getattr(text, "max_position_embeddings", None) or 0),
            vision_weights=sum(tensor.elements for tensor in found.vision),
            grows_to=_grows_to(kind, text),
            structure=found,
        )

    @property
    def is_native(self) -> bool:
        return False

    @property
    def layers_on_cpu(self) -> bool:
        return self.model_type in CPU_LAYERS

    @property
    def keeps_pages(self) -> bool:
        caches = self.structure.step.caches
        one = (self.num_kv_heads, 2 * self.head_dim, 0)
        alike = {(cache.heads, cache.width + cache.value_width, cache.state) for cache in caches} == {one}
        alike &= bool(self.latent) or all(cache.width == cache.value_width for cache in caches)
        # Pages of tokens that a window has left are kept, which transformers' cache of the family does without.
        return alike and (self.layers_on_cpu or not any(cache.window for cache in caches))

    @property
    def expert_bias(self) -> bool:
        return any(one.has_bias for one in self.structure.experts.values())

    @property
    def merges_experts(self) -> bool:
        return all(names is not None for names in self.structure.merged.values())

    @property
    def turns_experts(self) -> bool:
        names, modules = self.structure.names, self.structure.experts.values()
        return not self.merges_experts and any(names.is_converted(f"{one.module}.gate_up_proj") for one in modules)

    @property
    def towers(self) -> tuple[str, ...]:
        parts = (tensor.key.removeprefix("model.").partition(".")[0] for tensor in self.structure.vision)
        return tuple(dict.fromkeys(f"{part}." for part in parts))

    @property
    def embedding_module(self) -> str:
        return self.structure.embedding.removesuffix(".weight")

    def layer_prefix(self, layer: int) -> str:
        return f"{self.structure.layers}.{layer}."

    def kv_layers(self, context: int) -> Iterator[tuple[int, int]]:
        for layer, cache in enumerate(self.structure.step.caches):
            tokens = min(context, cache.window) if cache.window else context
            yield layer, tokens if cache.per_token else 0

    def kv_pages(self, context: int) -> int:
        return self.num_layers * -(-context // KV_PAGE_TOKENS)

    def kv_nbytes(self, context: int, bytes_per_value: float = 2) -> int:
        caches = self.structure.step.caches
        kept = sum(tokens * caches[layer].per_token for layer, tokens in self.kv_layers(context))
        return int((kept + sum(cache.state for cache in caches)) * bytes_per_value)

    def expert_module(self, layer: int, expert: int, projection: Projection) -> str:
        merged = self.structure.merged[layer]
        if merged is not None:
            return merged[projection].replace("*", str(expert), 1)
        return f"{self.structure.experts[layer].module}.{expert}.{projection}"

    def fused_form(self, layer: int) -> FusedForm:
        one = self.structure.experts[layer]
        return FusedForm(f"{one.module}.", one.transposed, one.interleaved, one.has_bias)

    def expert_linears(self, layer: int, expert: int) -> Iterator[LinearSpec]:
        hidden, inter, bias = self.hidden_size, self.expert_intermediate, self.structure.experts[layer].has_bias
        for projection in PROJECTIONS:
            rows, columns = (hidden, inter) if projection == "down_proj" else (inter, hidden)
            module = self.expert_module(layer, expert, projection)
            yield LinearSpec(module, "experts", rows, columns, layer, expert, projection, bias)

    def dense_linears(self) -> Iterator[LinearSpec]:
        yield from self.structure.linears

    def plain_tensors(self) -> Iterator[TensorSpec]:
        yield from self.structure.plain

    def vision_tensors(self) -> Iterator[TensorSpec]:
        """The tensors of towers that a run of text leaves out."""
        yield from self.structure.vision

    def runtime_name(self, module: str) -> str:
        known = self.structure.runtime.get(module)
        if known is not None:
            return known
        place = self.place(f"{module}.weight")
        if place is None:
            return module
        return place.module if place.expert is None else f"{place.module}.{place.expert}.{place.projection}"

    def place(self, key: str) -> Place | None:
        return self.structure.names.place(key)

    def saved_key(self, key: str) -> str:
        return key  # transformers has read it under this name, and will again

    def parse_name(self, key: str) -> TensorName | None:
        place = self.place(key)
        if place is None:
            return None
        module = key.removesuffix(f".{place.parameter}")
        if place.expert is not None or place.fused:
            layer = next(layer for layer, one in self.structure.experts.items() if one.module == place.module)
            suffix = "" if place.fused else place.parameter
            return TensorName(
                "experts", key if place.fused else module, suffix, layer, place.expert, place.projection, place.fused
            )
        parameter = f"{place.module}.{place.parameter}"
        role = self.structure.roles.get(parameter) or self.structure.roles.get(f"{place.module}.weight")
        if role is None:
            return None
        number = self.structure.number(parameter)
        return TensorName(role, module, place.parameter, number)

    def is_ignored(self, key: str) -> bool:
        return any(pattern.search(key) for pattern in self.structure.ignored)


def _grows_to(kind: str, text: Any) -> int:
    """See ModelShape: of a family whose attention is computed here, unless its RoPE changes within a text."""
    rope = getattr(text, "rope_parameters", None) or {}
    changes = rope.get("rope_type", "default") in ("dynamic", "longrope")
    return 0 if changes or kind not in CPU_LAYERS else int(getattr(text, "max_position_embeddings", None) or 0)
