"""The regular expressions that name the Linears of one scheme where a role has several.

Loaders try groups in orders of their own, so no two groups' expressions match the same module: each names
its layers, and its experts where a layer's differ.

Legend: L layers, E experts.
"""

import re
from collections.abc import Iterable, Mapping

from quant.model.families import PROJECTIONS, Family, Role
from quant.model.mixed_precision import MixedPrecision, scheme_of
from quant.model.shape import ModelShape
from quant.model.tensors import LinearSpec
from quant.model.vision import OUTSIDE_VISION, VISION_PATTERN
from quant.scheme import BF16, Scheme

# What vLLM fuses is stored alike, and is looked up by the fused module's name.
_FUSED = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
_Place = tuple[Role, str]  # a role, and one Linear's last name


def mixed_targets(shape: ModelShape, mixture: MixedPrecision) -> dict[Scheme, list[str]]:
    """Per scheme the expressions that match its Linears, with or without a multimodal prefix."""
    found: dict[Scheme, dict[_Place, dict[int, set[int]]]] = {}
    heads: dict[Scheme, dict[str, None]] = {}
    for linear in shape.linears():
        if linear.module not in mixture.modules:
            continue
        scheme = scheme_of(mixture, linear)
        if linear.layer is None:
            last = rf"re:.*{re.escape(linear.module.rpartition('.')[2])}$"
            heads.setdefault(scheme, {})[VISION_PATTERN if linear.role == "vision" else last] = None
            continue
        place = (linear.role, _name(shape, linear))
        experts = found.setdefault(scheme, {}).setdefault(place, {}).setdefault(linear.layer, set())
        if linear.expert is not None:
            experts.add(linear.expert)
    tower = mixture.get("vision", BF16) != BF16
    targets = {scheme: list(_expressions(shape, places, tower)) for scheme, places in found.items()}
    for scheme, names in heads.items():
        targets.setdefault(scheme, []).extend(names)
    return targets


def _name(shape: ModelShape, linear: LinearSpec) -> str:
    """What Linears of other layers and experts share: the last part of the name, in a family without a table all of
    it behind the layer's number, the expert's number as ``*``."""
    if shape.is_native:
        return linear.module.rpartition(".")[2]
    number = "" if linear.expert is None else f".{linear.expert}."
    rest = linear.module.partition(f"layers.{linear.layer}.")[2]
    return rest.replace(number, ".*.", 1) if number else rest


def _expressions(
    shape: ModelShape, places: Mapping[_Place, Mapping[int, set[int]]], tower: bool = False
) -> Iterable[str]:
    """One expression for all names of a role that have the same layers and experts; none that also matches a module
    of a ``tower`` that is quantized itself."""
    merged: dict[tuple[Role, tuple[int, ...], tuple[int, ...]], list[str]] = {}
    for (role, name), layers in places.items():
        alike: dict[tuple[int, ...], list[int]] = {}
        for layer, experts in layers.items():
            alike.setdefault(tuple(sorted(experts)), []).append(layer)
        for experts_alike, where in alike.items():
            merged.setdefault((role, tuple(sorted(where)), experts_alike), []).append(name)
    for (role, layers_of, experts_of), names in merged.items():
        numbers = "|".join(map(str, layers_of))
        inner = _inside(shape, role, experts_of, names)
        outside = OUTSIDE_VISION if tower and role == "attention" else ""
        yield rf"re:{outside}.*layers\.({numbers})\.{inner}$"


def _inside(shape: ModelShape, role: Role, experts: tuple[int, ...], names: list[str]) -> str:
    family = shape.family
    if not shape.is_native:
        numbers = r"\d+" if len(experts) == shape.num_experts else f"({'|'.join(map(str, experts))})"
        inner = f"({'|'.join(re.escape(name) for name in names)})".replace(r"\*", numbers)
        return inner if role == "experts" else inner.replace("experts", "expert[s]")
    if role == "attention":
        return rf"self_attn\.({'|'.join(_with_fused(names))})"
    if role == "shared_expert":
        return rf"{family.runtime_block}\.{family.shared_expert}\.({'|'.join(_with_fused(names))})"
    if role == "dense_mlp":
        return rf"{family.runtime_block}\.({'|'.join(_with_fused(names))})"
    blocks = "|".join(dict.fromkeys((family.block, family.runtime_block)))
    numbers = r"\d+" if len(experts) == shape.num_experts else f"({'|'.join(map(str, experts))})"
    return rf"({blocks})\.experts\.{numbers}\.({'|'.join(_with_runtime(family, names))})"


def _with_fused(names: list[str]) -> list[str]:
    return names + [fused for name, fused in _FUSED.items() if name in names]


def _with_runtime(family: Family, names: list[str]) -> list[str]:
    """An expert's projections by the checkpoint's names and by those of transformers."""
    runtime = [PROJECTIONS[family.projections.index(name)] for name in names]
    return list(dict.fromkeys([*names, *runtime]))
