"""What the ``quantization_config`` of a source's config.json says of the forms that Coldstream reads.

Only what the tensors do not say themselves is taken from it: the size of a block, whether integers are symmetric,
how words are packed. What it asks for beyond weights (activations in few bits) is the loader's business and changes
no weight; what changes weights and is not known (rotations, sparsity) is refused.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from quant.errors import CheckpointError
from quant.input_file import short, validated

_NAME = "config.json: quantization_config"
_INTEGER_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized")
_FLOAT_FORMATS = ("float-quantized", "naive-quantized")
_Block = Annotated[list[Annotated[int, Field(ge=1, le=2**20)]], Field(min_length=2, max_length=2)]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _Weights(_Record):
    num_bits: int
    type: Literal["int", "float"] = "int"
    symmetric: bool = True
    strategy: str | None = None
    group_size: int | None = None
    block_structure: _Block | None = None

    @property
    def columns(self) -> int | None:
        """Columns that share a scale, 0 for all of a row; None if it does not say."""
        if self.strategy in ("channel", "tensor"):
            return 0
        if self.strategy in ("group", None) and self.group_size is not None:
            return max(self.group_size, 0)
        return None


class _Group(_Record):
    weights: _Weights | None = None
    format: str | None = None


class CompressedTensors(_Record):
    """compressed-tensors: groups of modules, each with the form of its weights."""

    format: str | None = None
    config_groups: Annotated[dict[str, _Group | list[Any]], Field(max_length=2**10)] = Field(default_factory=dict)
    sparsity_config: dict[str, Any] | None = None
    transform_config: dict[str, Any] | None = None

    @property
    def weights(self) -> list[_Weights]:
        """The forms of weights that it names."""
        return [one.weights for one in self.config_groups.values() if isinstance(one, _Group) and one.weights]

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """The block sizes of fp8 weights."""
        found = (one.block_structure for one in self.weights if one.type == "float" and one.block_structure)
        return list(dict.fromkeys((height, width) for height, width in found))

    @property
    def strategies(self) -> frozenset[str]:
        """What a scale of fp8 weights may be for: tensor, channel or block; all where a group does not say."""
        said = {one.strategy for one in self.weights if one.type == "float"}
        known = frozenset(("tensor", "channel", "block") if self.blocks else ("tensor", "channel"))
        return known & said if said and said <= known else known

    def group_sizes(self, bits: int) -> list[int]:
        """Columns that share a scale in integers of ``bits`` bits, 0 for all of a row; none where a group does not
        say."""
        found = [one.columns for one in self.weights if one.type == "int" and one.num_bits == bits]
        return [] if None in found else sorted({size for size in found if size is not None})

    def has_one_scale(self, bits: int) -> bool:
        """Whether integers of ``bits`` bits may have one scale for all of a weight."""
        found = {one.strategy for one in self.weights if one.type == "int" and one.num_bits == bits}
        return not found or bool(found & {"tensor", None})

    def is_symmetric(self, module: str, bits: int) -> bool:
        """Whether integers of ``bits`` bits have no zero points. Raises CheckpointError if it says both or nothing."""
        found = {one.symmetric for one in self.weights if one.type == "int" and one.num_bits == bits}
        if len(found) != 1:
            what = "both symmetric and asymmetric ones" if found else "none"
            raise CheckpointError(f"{_NAME} has {what} for integers of {bits} bits, in which {module} is: expected one")
        return found.pop()

    def check(self) -> None:
        """Raise CheckpointError, naming it, for what changes weights in a way that is not known."""
        if (self.sparsity_config or {}).get("format", "dense") != "dense":
            raise CheckpointError("this checkpoint has sparse weights (sparsity_config), which are not supported")
        if (self.transform_config or {}).get("config_groups"):
            raise CheckpointError("this checkpoint has rotated weights (transform_config), which are not supported")
        for group in self.config_groups.values():
            if isinstance(group, _Group) and group.weights is not None:
                _check_format(group.weights, group.format or self.format)


def _check_format(weights: _Weights, name: str | None) -> None:
    known = _INTEGER_FORMATS if weights.type == "int" else _FLOAT_FORMATS
    bits = (4, 8) if weights.type == "int" else (8,)
    if weights.num_bits not in bits or (name not in known and name not in (None, "mixed-precision")):
        raise CheckpointError(
            f"this checkpoint has weights of {weights.num_bits} bits, type {weights.type}, in format {name}: expected "
            "int4, int8 or fp8 in compressed-tensors' pack-quantized, int-quantized or float-quantized format"
        )


class FineGrainedFloat8(_Record):
    """DeepSeek's fp8."""

    weight_block_size: _Block | None = None


class Gptq(_Record):
    """AutoGPTQ's and GPTQModel's integers; ``gptq_v2`` stores zero points as they are, ``gptq`` less one."""

    bits: int
    group_size: int = -1
    desc_act: bool | None = None
    checkpoint_format: Literal["gptq", "gptq_v2", ""] | None = None


class Awq(_Record):
    """AutoAWQ's integers, in the order of its ``gemm`` kernels."""

    bits: int
    group_size: int = -1
    version: str = "gemm"


class Plain(_Record):
    """A method of which the tensors say everything."""


Settings = CompressedTensors | FineGrainedFloat8 | Gptq | Awq | Plain
_METHODS: Mapping[str, type[Settings]] = {
    "compressed-tensors": CompressedTensors,
    "fp8": FineGrainedFloat8,
    "fbgemm_fp8": Plain,
    "mxfp4": Plain,
    "gptq": Gptq,
    "awq": Awq,
    "bitsandbytes": Plain,
}


def read_settings(found: object) -> tuple[str, Settings]:
    """The method that ``quantization_config`` names, and its settings. Raises CheckpointError if it is not known."""
    if not isinstance(found, dict):
        raise CheckpointError(f"{_NAME} is {short(found)}: expected an object")
    method = found.get("quant_method")
    if method is None and "bits" not in found and "config_groups" in found:
        method = "compressed-tensors"  # what Meta's and older checkpoints leave out
    if not isinstance(method, str) or method not in _METHODS:
        raise CheckpointError(
            f"this checkpoint is quantized by {short(method)}: expected one of {', '.join(_METHODS)}, or a checkpoint "
            "that is not quantized"
        )
    return method, validated(_METHODS[method], found, _NAME)
