"""Integers as GPTQ's and AWQ's own tools store them: packed along the rows or the columns of the transposed weight.

* GPTQ (AutoGPTQ, GPTQModel, AutoRound's ``auto_gptq``): ``qweight`` int32 ``[K·b/32, N]`` of b = 4 or 8 bits, code i
  of a word, at bits b·i, being that of row 8·word + i of ``[K, N]``; ``scales`` ``[G, N]``; ``qzeros`` int32
  ``[G, N·b/32]``, packed along N; ``g_idx`` int32 ``[K]``, the group of each input feature. ``checkpoint_format``
  "gptq" stores zero points less one (modulo 2^b), "gptq_v2" as they are.
* AWQ (AutoAWQ's ``gemm``): ``qweight`` int32 ``[K, N/8]`` and ``qzeros`` int32 ``[G, N/8]`` of 4 bits, both packed
  along N with the columns of a word in the order 0 2 4 6 1 3 5 7; ``scales`` ``[G, N]``.

W = (code - zero point) · scale, transposed to ``[N, K]``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from quant.checkpoint.checkpoint import Checkpoint
from quant.checkpoint.weight_files import TensorEntry
from quant.errors import CheckpointError
from quant.pack import unpack
from quant.sources.settings import Awq, Gptq
from quant.sources.weight import Integers, SourceWeight, beside, checked_order, expect, scaled

_SCALE_DTYPES = ("BF16", "F16", "F32")
_READ_BYTES = 16 * 2**20
_AWQ_PLACES = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # the nibble that column i of a word is in


@dataclass(frozen=True)
class TransposedWeight(SourceWeight):
    """``qweight``, ``qzeros`` and ``scales`` of ``width`` bits. Zero points are ``shift`` more than what is stored."""

    width: int
    shift: int
    is_awq: bool
    order: TensorEntry | None

    def rows(self, start: int, stop: int) -> Tensor:
        """See ``SourceWeight``."""
        return scaled(self._codes(start, stop), self._scales()[start:stop], self._zeros()[start:stop], self._order())

    @cached_property
    def bits(self) -> int:
        """See ``SourceWeight``: reads zero points and the order of a weight."""
        return self.width if self._order() is None and not self._zeros().any() else 0

    def integers(self, start: int, stop: int) -> Integers:
        """See ``SourceWeight``."""
        return Integers(self._codes(start, stop), self._scales()[start:stop])

    def _codes(self, start: int, stop: int) -> Tensor:
        """Codes less 2^(b-1) as int8 ``[R, K]``."""
        words = self.parts[0]
        if not self.is_awq:
            return unpack(self._columns(words, start, stop).t().contiguous(), self.width)
        first = start // 8
        codes = _awq_codes(self._columns(words, first, -(-stop // 8)))  # [K, columns]
        return codes[:, start - first * 8 : stop - first * 8].t().contiguous()

    def _columns(self, entry: TensorEntry, first: int, last: int) -> Tensor:
        """Columns ``[first, last)`` of a stored matrix, which is read some rows at a time."""
        height, width = entry.shape
        step = max(1, _READ_BYTES // (width * 4))
        blocks = [
            self.stored_rows(entry, row, min(height, row + step))[:, first:last].clone()
            for row in range(0, height, step)
        ]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def _scales(self) -> Tensor:
        """``[N, G]``."""
        return self.raw.read(self.parts[2].key).t().contiguous()

    def _zeros(self) -> Tensor:
        """Zero points less 2^(b-1) as int8 ``[N, G]``."""
        stored = self.raw.read(self.parts[1].key)
        zeros = _awq_codes(stored) if self.is_awq else unpack(stored, self.width)
        middle = 2 ** (self.width - 1)
        wrapped: Tensor = (zeros.int() + middle + self.shift) % (2 * middle) - middle
        return wrapped.to(torch.int8).t().contiguous()

    def _order(self) -> Tensor | None:
        """The group of each column; None where groups follow one another."""
        if self.order is None:
            return None
        columns, groups = self.shape[1], self.parts[2].shape[0]
        order = checked_order(self.raw, self.order, groups)
        plain = torch.arange(columns) // -(-columns // groups)
        return None if torch.equal(order, plain) else order


def _awq_codes(words: Tensor) -> Tensor:
    """int32 ``[X, N/8]`` in AWQ's order → codes less 8, int8 ``[X, N]``."""
    nibbles = unpack(words, 4)
    ordered: Tensor = nibbles.view(len(nibbles), -1, 8)[:, :, _AWQ_PLACES]
    return ordered.flatten(1)


def transposed_weights(raw: Checkpoint, settings: Gptq | Awq) -> Iterator[TransposedWeight]:
    """Every weight of ``raw`` that GPTQ's or AWQ's tools wrote. Raises CheckpointError, naming it, for a tensor that is
    missing or unfit."""
    is_awq = isinstance(settings, Awq)
    bits, kind = settings.bits, "AWQ" if is_awq else "GPTQ"
    if bits not in ((4,) if is_awq else (4, 8)) or (isinstance(settings, Awq) and settings.version.lower() != "gemm"):
        version = f" in version {settings.version}" if isinstance(settings, Awq) else ""
        raise CheckpointError(
            f"this checkpoint has weights of {bits} bits by {kind}{version}: expected 4 bits, or 8 by GPTQ, in "
            "the gemm version"
        )
    shift = 1 if isinstance(settings, Gptq) and settings.checkpoint_format != "gptq_v2" else 0
    per_word = 32 // bits
    for key, words in raw.entries.items():
        module, _, suffix = key.rpartition(".")
        if suffix != "qweight":
            continue
        zeros = beside(raw, words, f"{module}.qzeros", "zero points")
        scales = beside(raw, words, f"{module}.scales", "scales")
        order = None if is_awq else raw.entries.get(f"{module}.g_idx")
        if isinstance(settings, Gptq) and settings.desc_act and order is None:
            beside(raw, words, f"{module}.g_idx", "order of columns, which desc_act in config.json asks for")
        if len(words.shape) != 2 or len(scales.shape) != 2 or 0 in (*words.shape, *scales.shape):
            raise CheckpointError(f"{words.file}: {module} has no matrices as qweight and scales: expected those")
        columns, rows = (words.shape[0], scales.shape[1]) if is_awq else (words.shape[0] * per_word, scales.shape[1])
        groups = scales.shape[0]
        size = columns if settings.group_size < 1 else settings.group_size
        expect(words, ("I32",), (columns, rows // per_word) if is_awq else (columns // per_word, rows))
        expect(scales, _SCALE_DTYPES, (-(-columns // size), rows))
        expect(zeros, ("I32",), (groups, rows // per_word))
        if rows % per_word or columns % groups:
            raise CheckpointError(
                f"{words.file}: {module} is {rows}x{columns} in {groups} groups: expected whole words"
            )
        if order is not None:
            expect(order, ("I32", "I64"), (columns,))
        parts = (words, zeros, scales, *((order,) if order is not None else ()))
        form = f"{kind} int{bits}, groups of {columns // groups}"
        yield TransposedWeight(raw, f"{module}.weight", (rows, columns), form, parts, bits, shift, is_awq, order)
