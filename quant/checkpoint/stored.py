"""Which scheme each role of a quantized checkpoint has, read off its config.json alone. Pure Python.

Planning needs no weights: the ``quantization_config`` that a quantizer leaves in config.json says it all.
A module is matched as the formats' own loaders do it: compressed-tensors takes ``ignore`` first, then a
group's targets by name, by regular expression and by class name; bitsandbytes skips names by suffix, or
by regular expression from the start.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from quant.errors import CheckpointError, SchemeError
from quant.model.config import quantization_of
from quant.model.families import Role
from quant.model.mixed_precision import joined
from quant.model.shape import ModelShape
from quant.model.tensors import LinearSpec
from quant.scheme import BF16, Kind, Scheme


def stored_schemes(config: Mapping[str, Any], shape: ModelShape) -> Mapping[Role, Scheme] | None:
    """The scheme of each quantizable role, a MixedPrecision where a role has several; None for a config that
    says nothing of quantization.

    Raises CheckpointError for a quantization that is not among compressed-tensors' packed int4 and int8 and
    bitsandbytes' nf4.
    """
    found = quantization_of(config)
    if found is None:
        return None
    method = found.get("quant_method")
    if method not in ("compressed-tensors", "bitsandbytes"):
        raise CheckpointError(
            f"this checkpoint is quantized by {method!r}: expected compressed-tensors (int4, int8) or "
            "bitsandbytes (nf4); quantize the original with `coldstream quantize`"
        )
    if method == "compressed-tensors" and _names_layers(found):
        narrowed = {layer: _of_layer(found, layer) for layer in (None, *range(shape.num_layers))}
        return joined((one, _packed(narrowed[one.layer], _names(shape, one))) for one in shape.linears())
    scheme_of = _packed if method == "compressed-tensors" else _nf4
    return {role: scheme_of(found, _names(shape, linear)) for role, linear in _samples(shape).items()}


def _names_layers(found: Mapping[str, Any]) -> bool:
    """Whether some group is meant for certain layers or modules only."""
    groups = (found.get("config_groups") or {}).values()
    targets = [target for group in groups for target in group["targets"]]
    return any(re.search(r"layers\W*\(?\d", target) for target in targets)


# The layers that an expression of ours, or a module's name, is for.
_LAYERS = re.compile(r"layers\\?\.\(?(\d[\d|]*)\)?\\?\.")


def _of_layer(found: Mapping[str, Any], layer: int | None) -> dict[str, Any]:
    """``found`` without the targets that name other layers: there can be thousands of modules and hundreds of
    targets."""

    def may_match(target: str) -> bool:
        named = _LAYERS.search(target)
        return named is None or str(layer) in named[1].split("|")

    groups = {
        name: {**group, "targets": [target for target in group["targets"] if may_match(target)]}
        for name, group in (found.get("config_groups") or {}).items()
    }
    return {**found, "config_groups": groups}


def _samples(shape: ModelShape) -> dict[Role, LinearSpec]:
    """One Linear of each role."""
    samples: dict[Role, LinearSpec] = {}
    for linear in shape.dense_linears():
        samples.setdefault(linear.role, linear)
    if shape.moe_layers:
        samples["experts"] = next(shape.expert_linears(shape.moe_layers[0], 0))
    return samples


def _names(shape: ModelShape, linear: LinearSpec) -> tuple[str, ...]:
    """The names a loader may know ``linear`` by: the checkpoint's, the module's, each without prefix too."""
    runtime = linear.module.replace(f".{shape.family.block}.", f".{shape.family.runtime_block}.")
    names = (linear.module, runtime)
    return tuple(dict.fromkeys((*names, *(name.removeprefix(shape.prefix) for name in names))))


def _packed(found: Mapping[str, Any], names: Sequence[str]) -> Scheme:
    if any(_is(name, target) for name in names for target in found.get("ignore") or ()):
        return BF16
    groups = [group for group in (found.get("config_groups") or {}).values() if group.get("weights")]
    for matches in (lambda name, target: name == target, _is, lambda name, target: target == "Linear"):
        for group in groups:
            if any(matches(name, target) for name in names for target in group["targets"]):
                return _group_scheme(group["weights"])
    return BF16


def _is(name: str, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], name) is not None
    return name == target


def _group_scheme(weights: Mapping[str, Any]) -> Scheme:
    bits, size = weights.get("num_bits"), weights.get("group_size")
    kind = {4: "int4", 8: "int8"}.get(bits) if isinstance(bits, int) else None
    plain = weights.get("type") == "int" and weights.get("symmetric") and isinstance(size, int)
    if kind is None or not plain:
        raise CheckpointError(
            f"this checkpoint has weights of {bits} bits, type {weights.get('type')}, strategy "
            f"{weights.get('strategy')}: expected symmetric int4 or int8 in groups"
        )
    try:
        return Scheme(cast(Kind, kind), cast(int, size))
    except SchemeError as error:
        raise CheckpointError(f"this checkpoint cannot be run: {error}") from None


def _nf4(found: Mapping[str, Any], names: Sequence[str]) -> Scheme:
    if not found.get("load_in_4bit") or found.get("bnb_4bit_quant_type", "fp4") != "nf4":
        raise CheckpointError("this checkpoint is quantized by bitsandbytes, but not to nf4: expected nf4")
    skipped = found.get("llm_int8_skip_modules") or ["lm_head"]
    if any(name.endswith(skip) or re.match(skip, name) for name in names for skip in skipped):
        return BF16
    return Scheme("nf4")
