"""What every tensor of a checkpoint is for, and that it is what its form demands.

A tensor that is read without another one that belongs to it (fp8 weights without their scales, packed values
without their zero points) gives nonsense and no error. So each tensor is accounted for: it is one that the
model of config.json is made of, in the dtype and shape of its form, or one known to be without meaning, or
the checkpoint is refused by that tensor's name. Headers alone are read.

Forms of a Linear ``[N, K]`` (byte for byte in ``quant/scheme.py``): dense ``weight`` in a floating-point dtype;
packed ``weight_packed``, ``weight_scale`` and ``weight_shape``; nf4 ``weight``, ``weight.absmax``,
``weight.quant_map`` and ``weight.quant_state.bitsandbytes__nf4``.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from quant.checkpoint.headers import CheckpointHeaders, FusedExperts, read_headers
from quant.checkpoint.quantization import quantization
from quant.checkpoint.weight_files import TensorEntry
from quant.errors import CheckpointError, SchemeError
from quant.model.families import Role
from quant.model.mixed_precision import joined
from quant.model.tensors import LinearSpec
from quant.scheme import BF16, NF4_BLOCK, PACKED, Scheme

FLOATS = ("BF16", "F16", "F32", "F64")
NF4_STATE = "weight.quant_state.bitsandbytes__nf4"
_NF4_STATE_BYTES = 4096
# Made anew from the config by every loader.
_WITHOUT_MEANING = re.compile(r"(^|\.)rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)$")
_DEQUANTIZE = "start from the original bf16 checkpoint"
_Found = tuple[Scheme, Mapping[str, TensorEntry]]


def open_headers(path: Path | str) -> CheckpointHeaders:
    """Read the config.json, index and headers of the model directory ``path``, and check that they are of one
    model: see ``check_tensors``. Raises CheckpointError or UnknownFamilyError."""
    made = CheckpointHeaders(*read_headers(path))
    check_tensors(made)
    return made


def check_tensors(checkpoint: CheckpointHeaders) -> None:
    """Raise CheckpointError, naming the tensor, unless the files hold what config.json describes and no more."""
    said = quantization(checkpoint.config)
    allowed = {BF16} if said is None else {BF16, *said.schemes}
    used: set[str] = set()
    for linear, (scheme, entries) in _linears(checkpoint):
        if scheme not in allowed:
            what = "has no quantization_config" if said is None else f"knows {_listed(said.schemes)}"
            key = next(iter(entries.values())).key
            raise CheckpointError(
                f"{checkpoint.path}: tensor {key} is already quantized, to {scheme}, but config.json {what}: weights "
                "and config are not of one checkpoint"
            )
        used.update(entry.key for entry in entries.values())
        if scheme.is_packed:
            used.update(_weight_shape(checkpoint, linear))
    for key in _plain(checkpoint):
        used.add(key)
    for key in checkpoint.entries:
        if key not in used:
            _check_left_over(checkpoint, key)


def _linears(checkpoint: CheckpointHeaders) -> Iterator[tuple[LinearSpec, _Found]]:
    """Every Linear and what it is stored in; those of fused experts give the same tensors."""
    shape = checkpoint.shape
    for linear in shape.dense_linears():
        yield linear, find_weight(checkpoint, linear)
    for linear in shape.vision_linears():  # a text model may come without its tower, or with one in floats
        if checkpoint.alias(f"{linear.module}.weight_packed") in checkpoint.entries:
            yield linear, find_weight(checkpoint, linear)
    for layer in shape.moe_layers:
        found = checkpoint.fused_experts(layer)
        if found is not None:
            _check_fused(checkpoint, found)
            yield from ((linear, (BF16, found.entries)) for linear in shape.expert_linears(layer, 0))
            continue
        for expert in range(shape.num_experts):
            for linear in shape.expert_linears(layer, expert):
                yield linear, find_weight(checkpoint, linear)


def _check_fused(checkpoint: CheckpointHeaders, fused: FusedExperts) -> None:
    count = checkpoint.shape.num_experts
    for name, entry in fused.entries.items():
        if name.endswith("_bias"):
            hidden, inter = fused.dims
            _check_dense(checkpoint, entry, (count, hidden if name == "down_proj_bias" else 2 * inter))
            continue
        is_turned = checkpoint.shape.turns_experts and fused.transposed(name) != fused.form.transposed
        expected = fused.shape(name)[::-1] if is_turned else fused.shape(name)
        _check_dense(checkpoint, entry, (count, *expected))


def find_weight(checkpoint: CheckpointHeaders, spec: LinearSpec) -> _Found:
    """How ``spec``'s weight is stored, read off its tensors, and their entries by suffix.

    Raises CheckpointError if they are absent, or are not of the dtype and shape that their form and the config
    demand.
    """
    entries, module = checkpoint.entries, spec.module
    packed, scale = (entries.get(checkpoint.alias(f"{module}.{name}")) for name in ("weight_packed", "weight_scale"))
    if packed is not None:
        return _packed(checkpoint, spec, packed, scale)
    if scale is not None and checkpoint.alias(f"{module}.weight") not in entries:
        raise CheckpointError(f"{checkpoint.path}: tensor {scale.key} is a scale without the weights it belongs to")
    weight = checkpoint.find(f"{module}.weight")
    if f"{module}.{NF4_STATE}" in entries:
        return _nf4(checkpoint, spec)
    _check_dense(checkpoint, weight, _dims(spec))
    return BF16, {"weight": weight}


def _packed(checkpoint: CheckpointHeaders, spec: LinearSpec, packed: TensorEntry, scale: TensorEntry | None) -> _Found:
    if scale is None:
        raise CheckpointError(f"{checkpoint.path}: tensor {packed.key} has no scales: expected weight_scale beside it")
    rows, columns = _dims(spec)
    _check_dtype(checkpoint, packed, "I32")
    _check_dtype(checkpoint, scale, "BF16")
    words = packed.shape[1] if len(packed.shape) == 2 and packed.shape[0] == rows else 0
    groups = scale.shape[1] if len(scale.shape) == 2 and scale.shape[0] == rows else 0
    bits = next((bits for bits in PACKED if words * 32 == columns * bits), None)
    if bits is None or not groups or columns % groups:
        raise CheckpointError(
            f"{checkpoint.path}: {spec.module} is packed as {list(packed.shape)} with scales {list(scale.shape)} for a "
            f"{rows}x{columns} weight: expected 2, 3, 4 or 8 bits in groups of whole columns"
        )
    try:
        scheme = Scheme(PACKED[bits], columns // groups)
    except SchemeError as error:
        raise CheckpointError(f"{checkpoint.path}: {spec.module} cannot be run: {error}") from None
    return scheme, {"weight_packed": packed, "weight_scale": scale}


def _weight_shape(checkpoint: CheckpointHeaders, spec: LinearSpec) -> Iterator[str]:
    """The key of a packed weight's ``weight_shape``, if it is there."""
    entry = checkpoint.entries.get(checkpoint.alias(f"{spec.module}.weight_shape"))
    if entry is not None:
        if entry.dtype not in ("I64", "I32") or entry.shape != (2,):
            raise CheckpointError(
                f"{checkpoint.path}: tensor {entry.key} is {entry.dtype} {list(entry.shape)}: expected I64 [2]"
            )
        yield entry.key


def _nf4(checkpoint: CheckpointHeaders, spec: LinearSpec) -> _Found:
    weights, module = spec.weights, spec.module
    forms: dict[str, tuple[str, tuple[int, ...]]] = {
        "weight": ("U8", (weights // 2, 1)),
        "weight.absmax": ("F32", (weights // NF4_BLOCK,)),
        "weight.quant_map": ("F32", (16,)),
    }
    found = {name: checkpoint.entry(f"{module}.{name}") for name in (*forms, NF4_STATE)}
    for name, (dtype, shape) in forms.items():
        _check_dtype(checkpoint, found[name], dtype)
        if found[name].shape != shape:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {found[name].key} has shape {list(found[name].shape)}: expected "
                f"{list(shape)} for a {spec.out_features}x{spec.in_features} weight in nf4"
            )
    state = found[NF4_STATE]
    _check_dtype(checkpoint, state, "U8")
    if len(state.shape) != 1 or state.nbytes > _NF4_STATE_BYTES:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {state.key} has shape {list(state.shape)}: expected some bytes"
        )
    return Scheme("nf4"), found


def _plain(checkpoint: CheckpointHeaders) -> Iterator[str]:
    """Keys of the tensors that are never quantized: embeddings, routers, norms and biases."""
    shape = checkpoint.shape
    for tensor in shape.plain_tensors():
        entry = checkpoint.find(tensor.key)
        _check_dense(checkpoint, entry, tensor.shape)
        yield entry.key
    for layer in shape.moe_layers if shape.expert_bias else ():
        yield from _expert_biases(checkpoint, layer)
    if shape.attention_bias:  # a general shape has its biases among the plain tensors
        for linear in shape.dense_linears():
            if linear.role == "attention":
                entry = checkpoint.entry(f"{linear.module}.bias")
                _check_dense(checkpoint, entry, (linear.out_features,))
                yield entry.key


def _expert_biases(checkpoint: CheckpointHeaders, layer: int) -> Iterator[str]:
    """Keys of the biases of a layer's experts, where each has its own."""
    fused = checkpoint.fused_experts(layer)
    if fused is not None:
        yield from (entry.key for entry in fused.entries.values())
        return
    for expert in range(checkpoint.shape.num_experts):
        for linear in checkpoint.shape.expert_linears(layer, expert):
            entry = checkpoint.find(f"{linear.module}.bias")
            _check_dense(checkpoint, entry, (linear.out_features,))
            yield entry.key


def _check_left_over(checkpoint: CheckpointHeaders, key: str) -> None:
    """Refuse a tensor that nothing reads, unless it is known to be without meaning or of the vision tower."""
    if _WITHOUT_MEANING.search(key):
        return
    name, shape, entry = checkpoint.names[key], checkpoint.shape, checkpoint.entries[key]
    if name.role == "vision" and shape.is_multimodal:
        if entry.dtype not in FLOATS:
            raise _no_float(entry)
        return
    if name.suffix.startswith("weight_") or (name.suffix.startswith("weight.")):
        raise CheckpointError(
            f"{checkpoint.path}: tensor {key} belongs to a form of already quantized weights that is not supported: "
            f"{_DEQUANTIZE}"
        )
    if name.role == "lm_head" and shape.tie_word_embeddings:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {key} has no place in the model: config.json ties the output head to the "
            "embeddings; expected tie_word_embeddings to be false where the head has weights of its own"
        )
    raise CheckpointError(
        f"{checkpoint.path}: tensor {key} has no place in the model that config.json describes "
        f"({shape.num_layers} layers, {shape.num_experts} experts): weights and config are not of one model"
    )


def _check_dense(checkpoint: CheckpointHeaders, entry: TensorEntry, expected: tuple[int, ...]) -> None:
    if entry.dtype not in FLOATS:
        raise _no_float(entry)
    if entry.shape != expected:
        raise CheckpointError(
            f"{entry.file}: tensor {entry.key} has shape {list(entry.shape)}, but config.json says {list(expected)}: "
            "weights and config are not of one model"
        )


def _no_float(entry: TensorEntry) -> CheckpointError:
    return CheckpointError(
        f"{entry.file}: tensor {entry.key} has dtype {entry.dtype}, expected one of {', '.join(FLOATS)}: weights that "
        f"are already quantized like this, with or without scales beside them, are not supported; {_DEQUANTIZE}"
    )


def _check_dtype(checkpoint: CheckpointHeaders, entry: TensorEntry, expected: str) -> None:
    if entry.dtype != expected:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {entry.key} has dtype {entry.dtype}: expected {expected}, as its form demands"
        )


def _dims(spec: LinearSpec) -> tuple[int, int]:
    return spec.out_features, spec.in_features


def _listed(schemes: frozenset[Scheme]) -> str:
    return " and ".join(sorted(map(str, schemes))) or "no quantized weights"


def schemes_of_tensors(checkpoint: CheckpointHeaders) -> Mapping[Role, Scheme]:
    """The scheme of each role, read off the tensors; a MixedPrecision where a role has several."""
    return joined((linear, scheme) for linear, (scheme, _) in _linears(checkpoint))


def wider_bytes(checkpoint: CheckpointHeaders, schemes: Mapping[Role, Scheme] | None = None) -> dict[Role, int]:
    """By role, what dense weights take in memory beyond two bytes each: those stored in f32, or in f64, which is kept
    as f32. The vision tower is always kept in two. With ``schemes``: once the weights of those roles are quantized."""
    wider: dict[Role, int] = {}
    for key, entry in checkpoint.entries.items():
        name = checkpoint.names[key]
        is_weight = not name.suffix.startswith(("weight.", "weight_")) and not _WITHOUT_MEANING.search(key)
        if (schemes or {}).get(name.role, BF16) != BF16 and not name.suffix.endswith("bias"):
            continue
        if entry.kept_dtype == "F32" and is_weight and name.role != "vision":
            wider[name.role] = wider.get(name.role, 0) + 2 * math.prod(entry.shape)
    return wider
