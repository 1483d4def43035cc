"""One tensor of a model as its shape describes it, before any file is read."""

from dataclasses import dataclass

from quant.model.families import Projection, Role


@dataclass(frozen=True)
class LinearSpec:
    """One Linear of the model: checkpoint module name, role, place and dimensions ``[out, in]``."""

    module: str
    role: Role
    out_features: int
    in_features: int
    layer: int | None = None
    expert: int | None = None
    projection: Projection | None = None
    bias: bool = False  # of an expert, stored with it

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True)
class FusedForm:
    """How transformers' module holds the experts of a layer: under ``base``, ``gate_up_proj`` ``[E, 2I, H]`` and
    ``down_proj`` ``[E, H, I]`` or, ``transposed``, ``[E, H, 2I]`` and ``[E, I, H]``; gate and up one after the other
    or, ``interleaved``, in turn; with ``has_bias``, ``gate_up_proj_bias`` ``[E, 2I]`` and ``down_proj_bias``
    ``[E, H]`` beside them."""

    base: str
    transposed: bool
    interleaved: bool
    has_bias: bool


@dataclass(frozen=True)
class TensorSpec:
    """One tensor that is never quantized: key, role and shape."""

    key: str
    role: Role
    shape: tuple[int, ...]
    layer: int | None = None

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count
