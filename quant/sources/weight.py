"""One weight of a source checkpoint in somebody else's quantized form, read as the matrix that it stands for.

A form is a subclass of ``SourceWeight``: which stored tensors make up one weight, and how some of its rows are
computed from them. Rows are float32, in which the product of a code and its scale is exact for all forms whose scales
are 16 bits wide; rounded to the scale's dtype they are, bit for bit, what the library that defines the form returns.

Legend: E experts, N out features, K in features, G groups along K, R rows asked for.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quant.checkpoint.checkpoint import Checkpoint
from quant.checkpoint.weight_files import TensorEntry
from quant.errors import CheckpointError


@dataclass(frozen=True)
class Integers:
    """Rows of a weight that is symmetric integers times scales: W = values · scale.

    ``values`` int8 ``[R, K]``, ``scale`` ``[R, G]`` in the dtype that it is stored in.
    """

    values: Tensor
    scale: Tensor


@dataclass(frozen=True)
class SourceWeight(ABC):
    """A weight ``[N, K]`` or ``[E, N, K]`` called ``key``, made of the tensors ``parts`` of ``raw``.

    ``form`` is what the output calls it, for example "fp8, blocks of 128x128".
    """

    raw: Checkpoint
    key: str
    shape: tuple[int, ...]
    form: str
    parts: tuple[TensorEntry, ...]

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``[start, stop)`` as f32 ``[R, K]``; rows of all experts count on. Raises CheckpointError."""

    @property
    def kept(self) -> str:
        """The dtype that it is stored in where it is kept; empty where the model's will do."""
        return ""

    @property
    def bits(self) -> int:
        """Bits of the symmetric integers that ``integers`` gives; 0 where the weight is none."""
        return 0

    def integers(self, start: int, stop: int) -> Integers:
        """Rows ``[start, stop)`` as they are stored, where ``bits`` is not 0."""
        raise NotImplementedError

    @property
    def stored_nbytes(self) -> int:
        """Bytes of the tensors that it is made of."""
        return sum(part.nbytes for part in self.parts)

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    def stored_rows(self, entry: TensorEntry, start: int, stop: int) -> Tensor:
        """Rows of a stored tensor, its leading dimensions taken as one."""
        width = entry.shape[-1]
        row_bytes = entry.nbytes // max(1, math.prod(entry.shape[:-1]))
        return self.raw.read(entry.key, start * row_bytes, (stop - start, width))


def look_up(codes: Tensor, table: Tensor) -> Tensor:
    """``table[codes]`` for uint8 codes ``[..., C]`` and f32 ``[256, M]``: ``[..., C·M]``."""
    source: Any = codes.contiguous().numpy()
    found = np.take(table.numpy(), source, axis=0, mode="clip")  # a tenth of the time that torch's indexing takes
    return torch.from_numpy(found).view(*codes.shape[:-1], -1)


def expect(entry: TensorEntry, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> None:
    """Raise CheckpointError, naming it, unless ``entry`` has one of ``dtypes`` and one of ``shapes``."""
    if entry.dtype not in dtypes:
        raise CheckpointError(
            f"{entry.file}: tensor {entry.key} has dtype {entry.dtype}: expected {' or '.join(dtypes)}"
        )
    if entry.shape not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise CheckpointError(f"{entry.file}: tensor {entry.key} has shape {list(entry.shape)}: expected {wanted}")


def beside(raw: Checkpoint, owner: TensorEntry, key: str, what: str) -> TensorEntry:
    """The entry of ``key``, which ``owner`` makes no sense without. Raises CheckpointError if it is not there."""
    found = raw.entries.get(key)
    if found is None:
        raise CheckpointError(f"{owner.file}: tensor {owner.key} has no {what}: expected {key} beside it")
    return found


def scaled(values: Tensor, scale: Tensor, zero: Tensor | None = None, order: Tensor | None = None) -> Tensor:
    """(values - zero) · scale as f32 ``[R, K]``: ``values`` int8 ``[R, K]``, ``scale`` and ``zero`` ``[R, G]``,
    ``order`` the group of each column where they do not follow one another."""
    dense, factors = values.float(), scale.float()
    if order is not None:
        shifted = dense if zero is None else dense.sub_(zero.float()[:, order])
        return shifted.mul_(factors[:, order])
    groups = dense.view(len(dense), scale.shape[1], -1)
    shifted = groups if zero is None else groups.sub_(zero.float()[..., None])
    return shifted.mul_(factors[..., None]).view_as(dense)


def checked_order(raw: Checkpoint, entry: TensorEntry, groups: int) -> Tensor:
    """The group of each column, from ``entry``. Raises CheckpointError if there are not that many groups."""
    order = raw.read(entry.key).long()
    if int(order.min()) < 0 or int(order.max()) >= groups:
        raise CheckpointError(
            f"{entry.file}: tensor {entry.key} names groups {int(order.min())} to {int(order.max())}: expected 0 to "
            f"{groups - 1}"
        )
    return order
