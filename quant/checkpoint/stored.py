"""Which scheme each role of a quantized checkpoint has, read off its config.json alone. Pure Python.

Planning needs no weights: the ``quantization_config`` that a quantizer leaves in config.json says it all.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from quant.checkpoint.quantization import Quantization, quantization
from quant.model.families import Role
from quant.model.mixed_precision import joined
from quant.model.shape import ModelShape
from quant.model.tensors import LinearSpec
from quant.scheme import BF16, Scheme


def stored_schemes(config: Mapping[str, Any], shape: ModelShape) -> Mapping[Role, Scheme] | None:
    """The scheme of each quantizable role, a MixedPrecision where a role has several; None for a config that
    says nothing of quantization. A vision tower is named only where it is quantized.

    Raises CheckpointError for a quantization that is not among compressed-tensors' packed int4 and int8 and
    bitsandbytes' nf4.
    """
    found = quantization(config)
    if found is None:
        return None
    if found.names_modules:
        return joined(_each(found, shape))
    said = {role: found.scheme(_names(shape, linear)) for role, linear in _samples(shape).items()}
    return {role: scheme for role, scheme in said.items() if role != "vision" or scheme != BF16}


def _each(found: Quantization, shape: ModelShape) -> Iterator[tuple[LinearSpec, Scheme]]:
    """Every Linear and its scheme. A layer's experts are alike where nothing names one of them."""
    alike: dict[tuple[object, ...], Scheme] = {}
    for linear in shape.linears():
        expert = linear.expert if found.names_experts else None
        key = (linear.role, linear.layer, expert, linear.module.rpartition(".")[2])
        if key not in alike:
            alike[key] = found.scheme(_names(shape, linear))
        if linear.role != "vision" or alike[key] != BF16:
            yield linear, alike[key]


def _samples(shape: ModelShape) -> dict[Role, LinearSpec]:
    """One Linear of each role."""
    samples: dict[Role, LinearSpec] = {}
    for linear in (*shape.dense_linears(), *shape.vision_linears()):
        samples.setdefault(linear.role, linear)
    if shape.moe_layers:
        samples["experts"] = next(shape.expert_linears(shape.moe_layers[0], 0))
    return samples


def _names(shape: ModelShape, linear: LinearSpec) -> tuple[str, ...]:
    """The names a loader may know ``linear`` by: the checkpoint's, the module's, each without prefix too."""
    names = (linear.module, shape.prefix + shape.runtime_name(linear.module))
    return tuple(dict.fromkeys((*names, *(name.removeprefix(shape.prefix) for name in names))))
