"""Importance matrix: how strongly a text excites each input channel of each Linear, and rounding by it.

Per Linear the mean square of every input channel, as llama.cpp's imatrix has it, and the few directions that
inputs mostly lie along: a text's inputs X are taken for diag(d) + UᵀU, with U the first principal directions
of XᵀX / T and d what these leave of the mean squares. Scales are searched with the mean squares as weights;
then each value in turn takes the level at which its row's error costs least, given all others, some sweeps
long. The stored format is that of plain rounding.

Legend: N out features, K in features, G groups along K, R directions.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from safetensors.torch import load_file
from torch import Tensor

from quant.checkpoint.tensor_file import UNREADABLE, save_tensors
from quant.checkpoint.weight_files import read_header
from quant.errors import CheckpointError, InputError
from quant.input_file import parse_json, validated
from quant.pack import Packed, dequantize, pack
from quant.rounding.encode import Encoded, check_finite
from quant.rounding.rounding import Rounder
from quant.rounding.scales import best_scales, value_range
from quant.rounding.search import FRACTIONS
from quant.scheme import Scheme

VERSION = "coldstream importance matrix 1"
MARK = b"coldstream importance matrix"  # in the header of every file that is one
_FRACTIONS = {4: tuple(j / 32 for j in range(22, 35)), 3: FRACTIONS[3], 2: FRACTIONS[2]}
_SWEEPS = 2
_LEAST_REST = 0.05
_SAME = TypeAdapter(Annotated[dict[str, str], Field(min_length=1)], config=ConfigDict(strict=True))
_ROWS = 2**22  # weights that are rounded at once


class _About(BaseModel):
    """What the header of a file says beside its tensors; ``same`` is JSON, for each Linear the one whose moments it
    shares."""

    text: str
    model: str
    same: str


@dataclass(frozen=True)
class ChannelMoments:
    """A Linear's inputs: mean squares ``[K]`` and principal directions ``[R, K]``, as long as the root of the
    power along each; f32."""

    square: Tensor
    directions: Tensor

    @property
    def rest(self) -> Tensor:
        """The mean squares ``[K]`` that lie along no direction; never quite zero."""
        left = self.square - self.directions.square().sum(0)
        return left.maximum(_LEAST_REST * self.square) + 1e-4 * self.square.mean() + 1e-30

    def cost(self, error: Tensor) -> Tensor:
        """What ``error`` ``[N, K]`` in a weight does to its N outputs: their mean squares ``[N]``."""
        cost: Tensor = error.square() @ self.rest + (error @ self.directions.t()).square().sum(1)
        return cost


@dataclass(frozen=True)
class Imatrix:
    """Moments by checkpoint module; ``text`` identifies the tokens they are of, ``model`` the checkpoint."""

    moments: Mapping[str, ChannelMoments]
    text: str
    model: str

    def save(self, file: Path) -> None:
        """Write a safetensors file: ``MODULE.square`` and, in bf16, ``MODULE.directions``. Raises OutputError."""
        first: dict[int, str] = {}  # Linears with the same input have the same moments
        for module, moments in self.moments.items():
            first.setdefault(id(moments), module)
        tensors = {f"{name}.square": self.moments[name].square for name in first.values()}
        tensors |= {f"{name}.directions": self.moments[name].directions.bfloat16() for name in first.values()}
        same = {module: first[id(m)] for module, m in self.moments.items()}
        about = {"format": VERSION, "text": self.text, "model": self.model, "same": json.dumps(same)}
        save_tensors(file, tensors, about)

    @classmethod
    def load(cls, file: Path, model: str) -> "Imatrix":
        """Read what ``save`` wrote for the checkpoint of identity ``model``.

        Raises InputError if it is no importance matrix, or another model's.
        """
        try:
            entries, written = read_header(file)
        except CheckpointError as error:
            raise InputError(f"{file} cannot be read as an importance matrix: {error}") from None
        if written.get("format") != VERSION:
            raise InputError(f"{file} is no importance matrix: expected what --save-imatrix writes, or a text")
        about: _About = validated(_About, written, f"{file} is no importance matrix: it", InputError)
        if about.model != model:
            raise InputError(
                f"{file} is the importance matrix of another model ({about.model}, this one is {model}): "
                "measure this model's with --imatrix TEXT"
            )
        same: dict[str, str] = validated(
            _SAME, parse_json(about.same.encode(), f"{file}: its list of Linears", InputError), str(file), InputError
        )
        tensors = _loaded(file)
        stored = {name: _moments(tensors, name, file) for name in sorted(set(same.values()))}
        if len(tensors) != 2 * len(stored) or len(entries) != len(tensors):
            raise InputError(f"{file} is a damaged importance matrix: it holds tensors that no Linear has")
        moments = {module: stored[name] for module, name in same.items()}
        return cls(moments, about.text, model)


def _loaded(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except UNREADABLE as error:
        raise InputError(f"{file} cannot be read as an importance matrix: {error}") from None


def _moments(tensors: Mapping[str, Tensor], name: str, file: Path) -> ChannelMoments:
    """Those of one Linear. Raises InputError if they are not there or cannot be moments of anything."""
    square, directions = (tensors.get(f"{name}.{part}") for part in ("square", "directions"))
    if (
        square is None
        or directions is None
        or (square.dtype, directions.dtype) != (torch.float32, torch.bfloat16)
        or (square.ndim, directions.ndim) != (1, 2)
        or not 0 < square.shape[0] == directions.shape[1] >= directions.shape[0]
    ):
        raise InputError(
            f"{file} is a damaged importance matrix: it lacks what {name} takes in, or has it in another form"
        )
    if not (square.isfinite().all() and (square >= 0).all() and directions.isfinite().all()):
        raise InputError(f"{file} is a damaged importance matrix: {name} has NaN, infinity or a negative mean square")
    return ChannelMoments(square, directions.float())


def imatrix_name(text: str) -> str:
    """What a report calls rounding by the importance matrix of ``text``."""
    return f"imatrix {text}"


class Weighted:
    """Rounds int2 to int4 by an importance matrix; ``other`` does the rest, at eight bits there is little to win."""

    def __init__(self, imatrix: Imatrix, other: Rounder) -> None:
        self.imatrix, self._other = imatrix, other
        self.name = imatrix_name(imatrix.text)

    def encode(self, weight: Tensor, scheme: Scheme, label: str, transposed: bool, module: str, row: int) -> Encoded:
        """See ``Rounder``."""
        moments = self.imatrix.moments.get(module)
        if moments is None or not scheme.is_coarse:
            return self._other.encode(weight, scheme, label, transposed, module, row)
        check_finite(weight, label)
        dense = (weight.t() if transposed else weight).float()
        if len(moments.square) != dense.shape[1]:
            raise InputError(
                f"the importance matrix has {len(moments.square):,} channels for {label}, which has "
                f"{dense.shape[1]:,}: measure this model's with --imatrix TEXT"
            )
        step = max(1, _ROWS // dense.shape[1])
        done = [round_weighted(block.contiguous(), scheme, moments) for block in dense.split(step)]
        packed = torch.cat([one.packed for one in done])
        scale = torch.cat([one.scale for one in done])
        error = (dequantize(Packed(scheme, packed, scale)) - dense).square().sum(dtype=torch.float64)
        signal = dense.square().sum(dtype=torch.float64)
        return Encoded({"weight_packed": packed, "weight_scale": scale}, float(signal), float(error))


def round_weighted(weight: Tensor, scheme: Scheme, moments: ChannelMoments) -> Packed:
    """``weight`` f32 ``[N, K]`` in ``scheme``, int2 to int4, by ``moments``."""
    importance = moments.square + 1e-4 * moments.square.mean() + 1e-30
    scale = best_scales(weight, scheme, importance, _FRACTIONS[scheme.bits])
    values = _descend(weight, scale.repeat_interleave(scheme.group_size, 1), moments, *value_range(scheme))
    return Packed(scheme, pack(values.to(torch.int8), scheme.bits), scale.to(torch.bfloat16))


def _descend(weight: Tensor, scales: Tensor, moments: ChannelMoments, low: int, high: int) -> Tensor:
    """Values ``[N, K]``: nearest ones, then one column at a time the best given the rest."""
    columns, steps = weight.t().contiguous(), scales.t().contiguous()  # [K, N]: a column is a row
    values = (columns / steps).round_().clamp_(low, high)
    directions, rest = moments.directions.t().contiguous(), moments.rest  # [K, R]
    power = directions.square().sum(1)
    along = (values * steps - columns).t() @ directions  # [N, R]: the rows' errors along each direction
    order = torch.argsort(moments.square, descending=True).tolist()
    for _ in range(_SWEEPS):
        for k in order:
            error = values[k] * steps[k] - columns[k]
            pull = along @ directions[k] - error * power[k]
            values[k] = ((columns[k] - pull / (rest[k] + power[k])) / steps[k]).round_().clamp_(low, high)
            along.addr_(values[k] * steps[k] - columns[k] - error, directions[k])
    return values.t().contiguous()
