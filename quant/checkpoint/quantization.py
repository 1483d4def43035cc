"""The ``quantization_config`` of a config.json as a typed record, and what it says each Linear is stored as.

Two methods are known: compressed-tensors' packed int2, int3, int4 and int8, and bitsandbytes' nf4; whatever else such a
config may ask for (activations in few bits, rotations, a quantized KV cache) is refused rather than ignored.
A module is matched as the formats' own loaders do it: compressed-tensors takes ``ignore`` first, then a
group's targets by name, by regular expression and by class name; bitsandbytes skips names by suffix, or by
regular expression from the start. The expressions are foreign, too: all of them together have some seconds.
"""

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import regex
from pydantic import BaseModel, ConfigDict, Field

from quant.errors import CheckpointError, SchemeError
from quant.input_file import short, validated
from quant.model.config import quantization_of
from quant.scheme import BF16, PACKED, Scheme

_SECONDS = 20.0  # for all names and expressions of one config
_METHODS = ("compressed-tensors", "bitsandbytes")
# The layers that an expression of ours, or a module's name, is for.
_LAYERS = re.compile(r"layers\\?\.\(?(\d[\d|]*)\)?\\?\.")
_NAMES_LAYERS = re.compile(r"layers\W*\(?\d")
_NAMES_EXPERTS = re.compile(r"experts\W*\(?\d")
_LAYER = re.compile(r"layers\.(\d+)\.")

_Name = Annotated[str, Field(min_length=1, max_length=2**16)]
_Names = Annotated[list[_Name], Field(max_length=2**17)]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _Weights(_Record):
    num_bits: int
    type: str = "int"
    symmetric: bool = True
    strategy: str | None = None
    group_size: int | None = None

    def scheme(self) -> Scheme:
        plain = self.type == "int" and self.symmetric and self.group_size is not None
        if self.num_bits not in PACKED or not plain:
            raise CheckpointError(
                f"this checkpoint has weights of {self.num_bits} bits, type {self.type}, strategy {self.strategy}: "
                "expected symmetric int2, int3, int4 or int8 in groups"
            )
        try:
            return Scheme(PACKED[self.num_bits], self.group_size or 0)
        except SchemeError as error:
            raise CheckpointError(f"this checkpoint cannot be run: {error}") from None


class _Group(_Record):
    targets: _Names
    weights: _Weights | None = None
    input_activations: dict[str, Any] | None = None
    output_activations: dict[str, Any] | None = None
    format: str | None = None


class _CompressedTensors(_Record):
    format: str | None = None
    config_groups: Annotated[dict[str, _Group | list[Any]], Field(max_length=2**10)] = Field(default_factory=dict)
    ignore: _Names | None = None
    kv_cache_scheme: dict[str, Any] | None = None
    sparsity_config: dict[str, Any] | None = None
    transform_config: dict[str, Any] | None = None


class _Bitsandbytes(_Record):
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: str = "fp4"
    bnb_4bit_use_double_quant: bool = False
    llm_int8_skip_modules: _Names | None = None


class Quantization:
    """What a config.json says of quantization. ``schemes`` are all that a weight may have beside BF16."""

    def __init__(self, method: Literal["compressed-tensors", "bitsandbytes"], schemes: Sequence[Scheme]) -> None:
        self.method = method
        self.schemes = frozenset(schemes)

    def scheme(self, names: Sequence[str]) -> Scheme:
        """The scheme of the Linear that loaders know by ``names``."""
        raise NotImplementedError

    @property
    def names_modules(self) -> bool:
        """Whether some Linears of a role may have another scheme than the rest."""
        return any(targets.names_layers for targets in self._targets())

    @property
    def names_experts(self) -> bool:
        """Whether some experts of a layer may have another scheme than the rest."""
        return any(targets.names_experts for targets in self._targets())

    def _targets(self) -> "Sequence[_Targets]":
        raise NotImplementedError


def quantization(config: Mapping[str, Any]) -> Quantization | None:
    """What the dict of a config.json says of quantization; None if that is nothing.

    Raises CheckpointError for a method, or a form of one, that is not among compressed-tensors' packed int2 to
    int8 and bitsandbytes' nf4.
    """
    found = quantization_of(config)
    if found is None:
        return None
    name = "config.json: quantization_config"
    if not isinstance(found, dict):
        raise CheckpointError(f"{name} is {short(found)}: expected an object")
    method = found.get("quant_method")
    if method not in _METHODS:
        raise CheckpointError(
            f"this checkpoint is quantized by {short(method)}: expected compressed-tensors (int2 to int8) or "
            "bitsandbytes (nf4) to run; `coldstream quantize` makes that of many other forms"
        )
    if method == "bitsandbytes":
        return _Nf4(validated(_Bitsandbytes, found, name))
    return _Packed(validated(_CompressedTensors, found, name))


class _Packed(Quantization):
    def __init__(self, record: _CompressedTensors) -> None:
        # An empty list stands for the KV cache in some: a group is an object.
        groups = [group for group in record.config_groups.values() if isinstance(group, _Group) and group.weights]
        unknown = {group.format or record.format for group in groups} - {None, "pack-quantized", "mixed-precision"}
        asked = {
            f"format {sorted(map(str, unknown))[0]!r}" if unknown else "": bool(unknown),
            "quantized activations": any(group.input_activations or group.output_activations for group in groups),
            "a quantized KV cache (kv_cache_scheme)": bool(record.kv_cache_scheme),
            "sparse weights (sparsity_config)": (record.sparsity_config or {}).get("format", "dense") != "dense",
            "rotated weights (transform_config)": bool((record.transform_config or {}).get("config_groups")),
        }
        self._groups = [(_Targets(group.targets), group.weights.scheme()) for group in groups if group.weights]
        for what, is_asked in asked.items():
            if is_asked:
                raise CheckpointError(
                    f"this checkpoint has {what}: expected compressed-tensors' pack-quantized int2 to int8 weights "
                    "alone"
                )
        super().__init__("compressed-tensors", [scheme for _, scheme in self._groups])
        self._ignore = _Targets(record.ignore or ())

    def scheme(self, names: Sequence[str]) -> Scheme:
        if self._ignore.has_name(names) or self._ignore.has_pattern(names):
            return BF16
        for matches in (_Targets.has_name, _Targets.has_pattern, _Targets.has_linear):
            for targets, scheme in self._groups:
                if matches(targets, names):
                    return scheme
        return BF16

    def _targets(self) -> "Sequence[_Targets]":
        return [*(targets for targets, _ in self._groups), self._ignore]


class _Nf4(Quantization):
    def __init__(self, record: _Bitsandbytes) -> None:
        if not record.load_in_4bit or record.bnb_4bit_quant_type != "nf4":
            raise CheckpointError("this checkpoint is quantized by bitsandbytes, but not to nf4: expected nf4")
        if record.bnb_4bit_use_double_quant:
            raise CheckpointError(
                "this checkpoint has nf4 whose scales are quantized as well (bnb_4bit_use_double_quant): expected "
                "plain nf4; quantize the original with `coldstream quantize --experts nf4`"
            )
        super().__init__("bitsandbytes", [Scheme("nf4")])
        self._skipped = record.llm_int8_skip_modules or ["lm_head"]
        self._patterns = _Targets(f"re:{name}" for name in self._skipped)

    def scheme(self, names: Sequence[str]) -> Scheme:
        skipped = tuple(self._skipped)
        if any(name.endswith(skipped) for name in names) or self._patterns.has_pattern(names):
            return BF16
        return Scheme("nf4")

    def _targets(self) -> "Sequence[_Targets]":
        return [self._patterns]


class _Targets:
    """A list of targets; expressions that name layers are only tried on names of those: there can be hundreds of
    them, and thousands of modules."""

    def __init__(self, targets: Iterable[str]) -> None:
        self._names: set[str] = set()
        self._general: list[Any] = []
        self._by_layer: dict[str, list[Any]] = {}
        self.names_layers = self.names_experts = False
        self._deadline = 0.0
        for target in targets:
            self.names_layers = self.names_layers or _NAMES_LAYERS.search(target) is not None
            self.names_experts = self.names_experts or _NAMES_EXPERTS.search(target) is not None
            if target.startswith("re:"):
                self._add(target[3:])
            else:
                self._names.add(target)

    def _add(self, expression: str) -> None:
        try:
            pattern = regex.compile(expression)
        except (regex.error, RecursionError, OverflowError) as error:
            raise CheckpointError(
                f"config.json: quantization_config has a target that is no regular expression: {short(expression)} "
                f"({error})"
            ) from None
        named = _LAYERS.search(expression)
        for layer in named[1].split("|") if named else ():
            self._by_layer.setdefault(layer, []).append(pattern)
        if named is None:
            self._general.append(pattern)

    def has_name(self, names: Sequence[str]) -> bool:
        return not self._names.isdisjoint(names)

    def has_linear(self, names: Sequence[str]) -> bool:
        return "Linear" in self._names

    def has_pattern(self, names: Sequence[str]) -> bool:
        if not self._general and not self._by_layer:
            return False
        now = time.monotonic()
        self._deadline = self._deadline or now + _SECONDS
        layer = _LAYER.search(names[0])
        patterns = (*self._general, *self._by_layer.get(layer[1], ())) if layer else self._general
        try:
            left = max(self._deadline - now, 1e-3)
            return any(pattern.match(name, timeout=left) for pattern in patterns for name in names)
        except TimeoutError:
            raise CheckpointError(
                "config.json: quantization_config has regular expressions that take too long to match: expected one "
                "that a loader can use"
            ) from None
