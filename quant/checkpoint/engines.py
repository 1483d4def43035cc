"""What other engines load of a quantized checkpoint, as data, and what keeps one of them from loading a given one.

Facts are of the versions named, from their sources and from runs (docs/formats.md). What an engine loads and computes
wrongly, without an error, counts as not loaded.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from quant.model.families import QUANTIZABLE, ROLE_NAMES, Role
from quant.model.mixed_precision import scheme_of
from quant.model.shape import ModelShape
from quant.scheme import BF16, GROUP_SIZES, Scheme

EngineName = Literal["vllm", "sglang", "transformers"]
Schemes = Mapping[Role, Scheme]


@dataclass(frozen=True)
class Loader:
    """What one engine takes. ``kinds`` are the schemes of experts, ``others`` those of all other roles but the
    ``vision`` tower; ``groups`` the sizes that share a scale; ``alike`` whether the experts of a layer must have one
    scheme; ``fused_dense`` whether experts in bf16 are read beside quantized weights of other roles where they are
    stored fused; ``wrong`` families whose quantized experts it computes wrongly; ``single`` whether it reads single
    experts of a family whose own checkpoints have a layer's in one tensor."""

    title: str
    kinds: tuple[str, ...]
    others: tuple[str, ...]
    groups: tuple[int, ...]
    vision: tuple[str, ...] = ("bf16",)
    alike: bool = False
    fused_dense: bool = True
    wrong: Mapping[str, str] | None = None
    divisor: int = 1
    single: bool = True


_ALL = ("int2", "int3", "int4", "int8", "nf4", "bf16")
ENGINES: Mapping[EngineName, Loader] = {
    "transformers": Loader("transformers 5.23", _ALL, _ALL, GROUP_SIZES, vision=_ALL, single=False),
    "vllm": Loader(
        "vLLM 0.33",
        ("int4", "int8", "bf16"),
        ("int4", "int8", "bf16"),
        (32, 64, 128),
        alike=True,
        fused_dense=False,
        divisor=128,
    ),
    "sglang": Loader(
        "SGLang 0.5.23",
        ("int4", "bf16"),
        ("bf16",),
        (32, 128),
        alike=True,
        fused_dense=False,
        wrong={"llama4": "its kernel leaves out the router's score, which Llama 4 puts on the experts' input"},
    ),
}


def obstacles(shape: ModelShape, schemes: Schemes, loader: Loader) -> list[str]:
    """What keeps ``loader`` from loading a checkpoint of ``shape`` under ``schemes``, a sentence each; empty if
    nothing does."""
    found: dict[str, None] = {}
    for rule in (_kinds, _groups, _layers, _fused, _wrong, _divisor, _nf4, _single):
        found.update(dict.fromkeys(rule(shape, schemes, loader)))
    return list(found)


def _used(shape: ModelShape, schemes: Schemes) -> Iterator[tuple[Role, Scheme]]:
    """Every (role, scheme) that the checkpoint has."""
    seen = {(linear.role, scheme_of(schemes, linear)) for linear in shape.linears()}
    yield from sorted(seen, key=lambda one: (QUANTIZABLE.index(one[0]), str(one[1])))


def _kinds(shape: ModelShape, schemes: Schemes, loader: Loader) -> Iterator[str]:
    for role, scheme in _used(shape, schemes):
        known = {"experts": loader.kinds, "vision": loader.vision}.get(role, loader.others)
        if scheme.kind not in known:
            yield f"{ROLE_NAMES[role]} in {scheme.kind}: it takes {' or '.join(known)}"


def _groups(shape: ModelShape, schemes: Schemes, loader: Loader) -> Iterator[str]:
    for role, scheme in _used(shape, schemes):
        if scheme.is_packed and scheme.group_size not in loader.groups:
            sizes = " or ".join(map(str, loader.groups))
            yield f"{ROLE_NAMES[role]} in groups of {scheme.group_size}: it takes {sizes}"


def _layers(shape: ModelShape, schemes: Schemes, loader: Loader) -> Iterator[str]:
    for layer in shape.moe_layers if loader.alike else ():
        experts = (linear for expert in range(shape.num_experts) for linear in shape.expert_linears(layer, expert))
        found = dict.fromkeys(str(scheme_of(schemes, linear)) for linear in experts)
        if len(found) > 1:
            yield f"layer {layer} has experts in {' and '.join(found)}: it takes the first one's scheme for all of them"
            return


def _fused(shape: ModelShape, schemes: Schemes, loader: Loader) -> Iterator[str]:
    used = dict(_used(shape, schemes))
    dense = used.get("experts") == BF16 and any(scheme.is_packed for scheme in used.values())
    if dense and not loader.fused_dense and not shape.family.fused_transposed:
        yield "experts in bf16 beside quantized weights are stored fused: it takes them one by one"


def _wrong(shape: ModelShape, schemes: Schemes, loader: Loader) -> Iterator[str]:
    reason = (loader.wrong or {}).get(shape.family.name)
    if reason and any(role == "experts" and scheme != BF16 for role, scheme in _used(shape, schemes)):
        yield f"it loads quantized experts of {shape.family.name} and answers nonsense: {reason}"


def _divisor(shape: ModelShape, schemes: Schemes, loader: Loader) -> Iterator[str]:
    packed = any(role == "experts" and scheme.is_packed for role, scheme in _used(shape, schemes))
    if packed and shape.hidden_size % loader.divisor:
        yield f"hidden_size is {shape.hidden_size}: it takes multiples of {loader.divisor}"


def _nf4(shape: ModelShape, schemes: Schemes, loader: Loader) -> Iterator[str]:
    experts = any(role == "experts" and scheme.kind == "nf4" for role, scheme in _used(shape, schemes))
    if experts and "nf4" in loader.kinds and not shape.family.fused_transposed:
        yield f"experts of {shape.family.name} are in nf4: it takes those of Llama 4 only"


def _single(shape: ModelShape, schemes: Schemes, loader: Loader) -> Iterator[str]:
    quantized = any(role == "experts" and scheme != BF16 for role, scheme in _used(shape, schemes))
    if quantized and not loader.single and not shape.is_native and not shape.merges_experts:
        yield (
            f"experts of {shape.family.name} lie one by one: it has no place for them, its own checkpoints of that "
            "family hold a layer's in one tensor"
        )
