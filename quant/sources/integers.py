"""Weights in integers as compressed-tensors stores them: packed into int32 words, or a byte each.

* ``pack-quantized``: ``weight_packed`` int32 ``[N, K·b/32]`` of b = 4 or 8 bits, code i of a word at bits b·i, a code
  being the value + 2^(b-1); ``weight_scale`` ``[N, G]``; ``weight_shape`` (N, K); where not symmetric
  ``weight_zero_point`` int32 ``[N·b/32, G]``, packed along N in the same way; with activation order
  ``weight_g_idx`` int32 ``[K]``, the group of each column.
* ``int-quantized``: ``weight`` int8 ``[N, K]``, ``weight_scale``, and where not symmetric ``weight_zero_point``
  int8 ``[N, G]``.

A scale is for a group of columns, for a row (``[N, 1]``) or for the tensor (``[1]``).
W = (value - zero point) · scale.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from quant.checkpoint.checkpoint import Checkpoint
from quant.checkpoint.weight_files import TensorEntry
from quant.errors import CheckpointError
from quant.pack import unpack
from quant.sources.settings import CompressedTensors
from quant.sources.weight import Integers, SourceWeight, beside, checked_order, expect, scaled

_SCALE_DTYPES = ("BF16", "F16", "F32")
_BITS = (4, 8)


@dataclass(frozen=True)
class IntegerWeight(SourceWeight):
    """Integers of ``width`` bits. ``zero`` are zero points, ``order`` the group of each column, where there are any."""

    width: int
    values: TensorEntry
    scale: TensorEntry
    zero: TensorEntry | None = None
    order: TensorEntry | None = None

    @property
    def bits(self) -> int:
        """See ``SourceWeight``."""
        return self.width if self.zero is None and self.order is None else 0

    def integers(self, start: int, stop: int) -> Integers:
        """See ``SourceWeight``."""
        return Integers(self._values(start, stop), self._by_row(self.scale, start, stop))

    def rows(self, start: int, stop: int) -> Tensor:
        """See ``SourceWeight``."""
        made = self.integers(start, stop)
        zero = None if self.zero is None else self._zeros(start, stop)
        order = None if self.order is None else checked_order(self.raw, self.order, made.scale.shape[1])
        return scaled(made.values, made.scale, zero, order)

    def _values(self, start: int, stop: int) -> Tensor:
        stored = self.stored_rows(self.values, start, stop)
        return stored if self.values.dtype == "I8" else unpack(stored, self.width)

    def _by_row(self, entry: TensorEntry, start: int, stop: int) -> Tensor:
        """Rows of ``[N, G]``, or the one value of a tensor for each row."""
        if len(entry.shape) == 2 and entry.shape[0] == self.shape[0]:
            return self.stored_rows(entry, start, stop)
        return self.raw.read(entry.key).reshape(1, 1).expand(stop - start, 1)

    def _zeros(self, start: int, stop: int) -> Tensor:
        assert self.zero is not None
        if self.zero.dtype == "I8":
            return self._by_row(self.zero, start, stop)
        packed = self.raw.read(self.zero.key)  # [N·b/32, G]: a column's words follow one another
        return unpack(packed.t().contiguous(), self.width).t()[start:stop]


def integer_weights(raw: Checkpoint, settings: CompressedTensors) -> Iterator[IntegerWeight]:
    """Every integer weight of ``raw``. Raises CheckpointError, naming it, for a tensor that is missing or unfit."""
    for key, entry in raw.entries.items():
        module, _, suffix = key.rpartition(".")
        if suffix == "weight_packed":
            yield _packed(raw, entry, module, settings)
        elif suffix == "weight" and entry.dtype == "I8" and f"{module}.SCB" not in raw.entries:
            yield _made(raw, entry, module, entry.shape, 8, settings)


def _packed(raw: Checkpoint, packed: TensorEntry, module: str, settings: CompressedTensors) -> IntegerWeight:
    expect(packed, ("I32",), packed.shape if len(packed.shape) == 2 else (0, 0))
    said = beside(raw, packed, f"{module}.weight_shape", "shape")
    expect(said, ("I64", "I32"), (2,))
    rows, columns = raw.read(said.key).tolist()
    bits = next((b for b in _BITS if packed.shape == (rows, -(-columns * b // 32))), None)
    if bits is None or columns % (32 // bits):
        raise CheckpointError(
            f"{packed.file}: tensor {packed.key} is {list(packed.shape)} words for a {rows}x{columns} weight: expected "
            "4 or 8 bits for each, and words that end with a row"
        )
    return _made(raw, packed, module, (rows, columns), bits, settings, said)


def _made(
    raw: Checkpoint,
    values: TensorEntry,
    module: str,
    shape: tuple[int, ...],
    bits: int,
    settings: CompressedTensors,
    *said: TensorEntry,
) -> IntegerWeight:
    if len(shape) != 2 or 0 in shape:
        raise CheckpointError(f"{values.file}: tensor {values.key} has shape {list(shape)}: expected a matrix")
    rows, columns = shape
    scale = beside(raw, values, f"{module}.weight_scale", "scales")
    groups = scale.shape[1] if len(scale.shape) == 2 and scale.shape[0] == rows else 1
    single = ((1,), (), (1, 1)) if settings.has_one_scale(bits) else ()
    expect(scale, _SCALE_DTYPES, (rows, groups), *single)
    if not groups or columns % groups:
        raise CheckpointError(
            f"{scale.file}: tensor {scale.key} has {groups} groups for {columns} columns: expected groups of as many "
            "columns each"
        )
    sizes = settings.group_sizes(bits)
    if sizes and columns // groups not in [size or columns for size in sizes]:
        expected = " or ".join("one" if size == 0 else f"one for {size} columns" for size in sizes)
        raise CheckpointError(
            f"{scale.file}: tensor {scale.key} has {groups} scales for {columns} columns: config.json says {expected}"
        )
    zero, order = (raw.entries.get(f"{module}.weight_{name}") for name in ("zero_point", "g_idx"))
    if settings.is_symmetric(module, bits):
        if zero is not None:
            raise CheckpointError(
                f"{zero.file}: tensor {zero.key} is a zero point, but config.json says that the weights are symmetric"
            )
    else:
        zero = beside(raw, values, f"{module}.weight_zero_point", "zero points")
        if values.dtype == "I8":
            expect(zero, ("I8",), scale.shape)
        else:
            expect(zero, ("I32",), (-(-rows * bits // 32), groups))
            if rows % (32 // bits):
                raise CheckpointError(f"{zero.file}: tensor {zero.key} does not end with a word: {rows} rows")
    if order is not None:
        expect(order, ("I32", "I64"), (columns,))
    parts = (values, scale, *said, *(one for one in (zero, order) if one is not None))
    form = f"int{bits}, {_shared(scale, rows, columns)}" + (", zero points" if zero is not None else "")
    form += ", activation order" if order is not None else ""
    return IntegerWeight(raw, f"{module}.weight", shape, form, parts, bits, values, scale, zero, order)


def _shared(scale: TensorEntry, rows: int, columns: int) -> str:
    """What a scale is for, in words."""
    if len(scale.shape) != 2 or scale.shape[0] != rows:
        return "a scale per tensor"
    return "a scale per channel" if scale.shape[1] == 1 else f"groups of {columns // scale.shape[1]}"
