"""The ``quantization_config`` of a quantized checkpoint: compressed-tensors' groups, or bitsandbytes'
settings.

compressed-tensors matches a module by exact name, then by regular expression, then by class name, and
``ignore`` wins over all. So the routed experts' scheme is the group that targets ``"Linear"`` (vLLM looks the
experts up there, transformers too when it fuses them), other roles with a scheme of their own are regular
expressions, and everything left dense is ignored. The head is always named, because vLLM's is no ``Linear``.
When the groups differ, the experts' group also names the experts, which is how transformers tells it from the
dense modules' group where it dequantizes while loading.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from quant.checkpoint.targets import mixed_targets
from quant.errors import RecipeError
from quant.model.families import QUANTIZABLE, ROLE_NAMES, Family, Role
from quant.model.mixed_precision import MixedPrecision, scheme_of
from quant.model.shape import ModelShape
from quant.model.vision import OUTSIDE_VISION, VISION_PATTERN
from quant.scheme import BF16, GROUP_SIZES, Scheme

_LAYER = re.compile(r"^.*?layers\.\d+\.(.+)$")
_EXPERTS = r"re:.*\.experts(\..+)?$"


def check_schemes(shape: ModelShape, schemes: Mapping[Role, Scheme]) -> list[str]:
    """Refuse what no loader could read, before anything is written; returns remarks for the user.

    Raises RecipeError for a role that cannot be quantized, nf4 beside a packed kind, or nothing to quantize;
    SchemeError if a scheme does not fit a Linear, naming it.
    """
    for role in schemes:
        if role not in QUANTIZABLE:
            raise RecipeError(f"role {role!r} cannot be quantized: expected one of {', '.join(QUANTIZABLE)}")
    present = _present(shape)
    used = {role: schemes[role] for role in QUANTIZABLE if role in present and schemes.get(role, BF16) != BF16}
    if not used:
        raise RecipeError(
            "nothing to quantize: every role that this model has stays bf16; name at least one, for example "
            "--experts int4"
        )
    if any(s.kind == "nf4" for s in used.values()) and any(s.is_packed for s in used.values()):
        mixed = ", ".join(f"{ROLE_NAMES[role]} {scheme}" for role, scheme in used.items())
        raise RecipeError(
            f"nf4 and int2 to int8 cannot be mixed in one checkpoint ({mixed}): the formats have different "
            "loaders; "
            "choose nf4 for all of them or for none"
        )
    check_groups(shape, schemes)
    notes = _check_vision(shape, schemes)
    if isinstance(schemes, MixedPrecision):
        _check_fusable(shape, schemes)
        notes += _unlike_experts(shape, schemes)
    if not shape.is_native and not shape.merges_experts and schemes.get("experts", BF16) != BF16:
        notes.append(
            f"transformers has no place for single experts of {shape.family.name}: coldstream runs this checkpoint, as "
            "do engines that read those of llm-compressor, but transformers' own loader does not"
        )
    unrun = [ROLE_NAMES[role] for role, scheme in used.items() if scheme.kind == "nf4" and role != "experts"]
    if unrun:
        notes.append(f"{', '.join(unrun)} in nf4: bitsandbytes reads that, but coldstream runs experts only in nf4")
    if shape.tie_word_embeddings and schemes.get("lm_head", BF16) != BF16:
        notes.append("lm_head is tied to the embeddings, which are kept as they are: its scheme is not used")
    return notes


def check_groups(shape: ModelShape, schemes: Mapping[Role, Scheme]) -> None:
    """Raise SchemeError if a scheme does not fit a Linear, naming it and the groups that do."""
    one = shape.expert_linears(shape.moe_layers[0], 0) if shape.moe_layers else ()
    alike = (*shape.dense_linears(), *shape.vision_linears(), *one)
    for linear in shape.linears() if isinstance(schemes, MixedPrecision) else alike:
        scheme_of(schemes, linear).check(linear.module, linear.out_features, linear.in_features)


def in_fitting_groups(shape: ModelShape, schemes: Mapping[Role, Scheme]) -> dict[Role, Scheme]:
    """``schemes`` with the largest groups, no larger than theirs, that divide every Linear of a role; bf16 where none
    does."""
    return {role: _in_fitting_groups(shape, role, scheme) for role, scheme in schemes.items()}


def _in_fitting_groups(shape: ModelShape, role: Role, scheme: Scheme) -> Scheme:
    one = shape.expert_linears(shape.moe_layers[0], 0) if shape.moe_layers else ()
    linears = (*shape.dense_linears(), *shape.vision_linears(), *one)
    widths = {linear.in_features for linear in linears if linear.role == role}
    sizes = [size for size in GROUP_SIZES if size <= scheme.group_size and not any(width % size for width in widths)]
    if not scheme.is_packed:
        return scheme
    return replace(scheme, group_size=max(sizes)) if sizes else BF16


def _check_vision(shape: ModelShape, schemes: Mapping[Role, Scheme]) -> list[str]:
    """A remark if there is no tower that could be quantized. Raises RecipeError for a scheme that none is kept in."""
    scheme = schemes.get("vision", BF16)
    if scheme.kind not in ("int8", "bf16"):
        raise RecipeError(f"the vision tower in {scheme}: expected int8, or bf16")
    if scheme == BF16 or shape.vision_tower is not None:
        return []
    if shape.is_multimodal:
        return [f"the vision tower stays as it is: only Llama 4's is quantized, not that of {shape.family.name}"]
    return ["this model has no vision tower: its scheme is not used"]


def _unlike_experts(shape: ModelShape, mixture: MixedPrecision) -> list[str]:
    """A remark if the experts of some layer are not all stored alike: vLLM does not notice."""
    for layer in shape.moe_layers:
        experts = (linear for expert in range(shape.num_experts) for linear in shape.expert_linears(layer, expert))
        found = dict.fromkeys(str(scheme_of(mixture, linear)) for linear in experts)
        if len(found) > 1:
            return [
                f"layer {layer} has experts in {' and '.join(found)}: vLLM takes the first expert's scheme for all of "
                "a layer and would answer nonsense without an error; run this checkpoint with coldstream or "
                "transformers, or quantize without --per-expert"
            ]
    return []


def _check_fusable(shape: ModelShape, mixture: MixedPrecision) -> None:
    """transformers fuses the experts of every family but Llama 4 while loading, and unpacks all of them by
    one scheme."""
    routed = {str(scheme_of(mixture, linear)) for linear in shape.linears() if linear.role == "experts"}
    if len(routed) > 1 and (shape.merges_experts or not shape.is_native):
        raise RecipeError(
            f"experts in {' and '.join(sorted(routed))} in one {shape.family.name} checkpoint: transformers "
            "loads all of them as one; let the roles beside the experts differ"
        )


def quantization_config(shape: ModelShape, schemes: Mapping[Role, Scheme]) -> dict[str, Any]:
    """The dict for config.json; ``schemes`` have passed ``check_schemes``."""
    present = _present(shape)
    used = {role: schemes[role] for role in QUANTIZABLE if role in present and schemes.get(role, BF16) != BF16}
    dense = [role for role in QUANTIZABLE if role not in used]
    if any(scheme.kind == "nf4" for scheme in used.values()):
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": _skipped(shape, dense),
        }
    groups = _mixed_groups(shape, schemes) if isinstance(schemes, MixedPrecision) else _groups(shape, used)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "config_groups": {f"group_{i}": _group(scheme, targets) for i, (scheme, targets) in enumerate(groups)},
        "ignore": _ignored(shape, dense),
    }


def _groups(shape: ModelShape, used: Mapping[Role, Scheme]) -> list[tuple[Scheme, list[str]]]:
    tower = "vision" in used
    groups: list[tuple[Scheme, list[str]]] = []
    for role, scheme in used.items():  # experts first, where they are quantized
        if not groups:
            groups.append((scheme, ["Linear"]))
        if scheme == groups[0][0] and role == "lm_head":
            groups[0][1].extend(patterns_of(shape, role, tower))  # vLLM's head is of no class called Linear
        elif scheme != groups[0][0]:
            patterns = patterns_of(shape, role, tower)
            same = next((targets for known, targets in groups[1:] if known == scheme), None)
            if same is None:
                groups.append((scheme, patterns))
            else:
                same.extend(patterns)
    if len(groups) > 1 and "experts" in used:
        groups[0][1].insert(0, _EXPERTS)
    # Class names last: what a regular expression also matches is not searched again.
    return [*groups[1:], groups[0]]


def _mixed_groups(shape: ModelShape, mixture: MixedPrecision) -> list[tuple[Scheme, list[str]]]:
    """Every Linear by its expression, the experts' commonest scheme last and beside "Linear"; first the
    experts', which transformers takes the first of to have all experts' width."""
    targets = mixed_targets(shape, mixture)
    last = next(iter(mixture.values()))
    targets[last].append("Linear")
    return [*((scheme, names) for scheme, names in targets.items() if scheme != last), (last, targets[last])]


def stores_fused_experts(shape: ModelShape, schemes: Mapping[Role, Scheme]) -> bool:
    """Whether dense experts must be stored fused.

    Beside packed tensors transformers takes an expert's tensors for packed too wherever it fuses them while
    loading (every family but Llama 4); what is fused already it loads as it is.
    """
    packed = any(scheme.is_packed for scheme in schemes.values())
    return packed and schemes.get("experts", BF16) == BF16 and shape.merges_experts


def _present(shape: ModelShape) -> set[Role]:
    roles: set[Role] = {linear.role for linear in (*shape.dense_linears(), *shape.vision_linears())}
    return roles | {"experts"} if shape.moe_layers else roles


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    return {
        "targets": targets,
        "weights": {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": scheme.group_size,
            "dynamic": False,
            "actorder": None,
            "observer": "minmax",
        },
        "input_activations": None,
        "output_activations": None,
    }


def patterns_of(shape: ModelShape, role: Role, tower: bool = False) -> list[str]:
    """Regular expressions for every module of ``role``, by its name in a checkpoint and in transformers' model; none
    that also matches one of a vision ``tower`` that is quantized itself."""
    if shape.is_native or role in ("experts", "lm_head"):
        found = _pattern(shape.family, role)
        return [found.replace("re:", f"re:{OUTSIDE_VISION}", 1) if tower and role == "attention" else found]
    return names_alike(shape, (linear.module for linear in shape.dense_linears() if linear.role == role))


def names_alike(shape: ModelShape, modules: Iterable[str]) -> list[str]:
    """Expressions for ``modules``, those of all layers by one."""
    inner: dict[str, None] = {}
    outer: dict[str, None] = {}
    for module in modules:
        for name in (module, shape.runtime_name(module)):
            found = _LAYER.match(name)
            (outer if found is None else inner)[re.escape(name if found is None else found[1])] = None
    layered = [rf"re:.*layers\.\d+\.({'|'.join(inner)})$"] if inner else []
    # transformers takes a group that has the word in an expression for the routed experts'
    return [name.replace("experts", "expert[s]") for name in (*layered, *(rf"re:.*{name}$" for name in outer))]


def _pattern(family: Family, role: Role) -> str:
    """A regular expression for every module of ``role``, with or without a multimodal prefix.

    It matches fused modules too: vLLM tries class names before it takes its fused modules apart.
    """
    if role == "experts":
        return _EXPERTS
    if role == "shared_expert":
        return rf"re:.*\.{family.shared_expert or 'shared_expert'}\..*"
    if role == "dense_mlp":
        return rf"re:.*\.{family.runtime_block}\.(gate|up|gate_up|down)_proj$"
    if role == "attention":
        return r"re:.*\.self_attn\.(q|k|v|qkv|o)_proj$"
    return VISION_PATTERN if role == "vision" else r"re:.*lm_head$"


def _ignored(shape: ModelShape, dense: list[Role]) -> list[str]:
    if shape.is_native:
        blocks = sorted({shape.family.block, shape.family.runtime_block})
        ignored = [rf"re:.*\.{block}\.{shape.family.router}$" for block in blocks]
    else:
        ignored = names_alike(shape, _plain_modules(shape))
        ignored += [f"re:.*{re.escape(tower)}.*" for tower in shape.towers]
    tower = shape.vision_tower is not None and "vision" not in dense
    for role in dense:
        named = role != "vision" and (role in _present(shape) or role == "lm_head")
        ignored += patterns_of(shape, role, tower) if named else []
    if tower:
        ignored += ["re:.*patch_embedding.*"]
    elif shape.is_native and shape.is_multimodal:
        ignored += ["re:.*vision_model.*", "re:.*multi_modal_projector.*"]
    return ignored


def _plain_modules(shape: ModelShape) -> Iterator[str]:
    """What may be a Linear and is never quantized."""
    for tensor in shape.plain_tensors():
        if tensor.key.endswith(".weight") and len(tensor.shape) == 2 and tensor.role != "embeddings":
            yield tensor.key.removesuffix(".weight")


def _skipped(shape: ModelShape, dense: list[Role]) -> list[str]:
    """Names that transformers' bitsandbytes integration leaves alone: it
    matches suffixes, and regular expressions from the start of a name."""
    family = shape.family
    if not shape.is_native:
        kept = names_alike(shape, _plain_modules(shape)) + [f"re:.*{re.escape(tower)}.*" for tower in shape.towers]
        kept += [pattern for role in dense if role != "vision" for pattern in patterns_of(shape, role)]
        return [pattern.removeprefix("re:") for pattern in kept]
    names: dict[Role, list[str]] = {
        "experts": [r".*\.experts"],
        "shared_expert": [rf".*\.{family.shared_expert or 'shared_expert'}"],
        "dense_mlp": [f"{family.runtime_block}.{name}" for name in ("gate_proj", "up_proj", "down_proj")],
        "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "lm_head": ["lm_head"],
        "vision": [],
    }
    skipped = ["vision_model", "multi_modal_projector", family.router]
    return skipped + [name for role in dense for name in names[role]]
