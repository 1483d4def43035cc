"""A Hugging Face checkpoint read lazily: headers first, then one tensor, or one expert's slice, at a time.

Files are read with ``pread`` into buffers of our own. Mapping them would be less code, but mapped pages count
as resident memory, and a converter that promises a bound must not depend on when the kernel takes them back.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from quant.checkpoint.file_states import FileStates
from quant.checkpoint.headers import FUSED, CheckpointHeaders, read_headers
from quant.checkpoint.inventory import check_tensors
from quant.errors import CheckpointError
from quant.input_file import opened
from quant.model.families import PROJECTIONS, Projection

DTYPES: dict[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class WeightView:
    """One Linear's dense weight: ``[N, K]``, or ``[K, N]`` where ``transposed``; rows may be strided."""

    key: str
    tensor: Tensor
    transposed: bool

    def dense(self) -> Tensor:
        """The weight as ``[N, K]``."""
        return self.tensor.t() if self.transposed else self.tensor


class Checkpoint(CheckpointHeaders):
    """One model directory whose tensors can be read. Opening reads headers only."""

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Read config.json, the index and all headers, and check that they are of one model: see
        ``quant.checkpoint.inventory``. Raises CheckpointError or UnknownFamilyError."""
        made = cls(*read_headers(path))
        check_tensors(made)
        return made

    @property
    def sidecar_folder(self) -> Path:
        """Where the files are that travel with the weights: tokenizer, templates, terms."""
        return self.path

    def read(self, key: str, start: int = 0, shape: tuple[int, ...] | None = None) -> Tensor:
        """A copy of tensor ``key``, or of ``shape`` elements of it that begin ``start`` bytes in.

        Raises CheckpointError if the tensor is absent, or its file is no longer the one that was opened.
        """
        entry = self.entry(key)
        dtype = DTYPES[entry.dtype]
        wanted = entry.shape if shape is None else shape
        tensor = torch.empty(wanted, dtype=dtype)
        if tensor.numel():
            array: Any = tensor.view(-1).view(torch.uint8).numpy()
            read_into(entry.file, entry.offset + start, memoryview(array), self.states)
        return tensor

    def expert(self, layer: int, expert: int) -> dict[Projection, WeightView]:
        """The three dense weights of one routed expert, read from fused or per-expert tensors."""
        fused = self.fused_experts(layer)
        if fused is None:
            linears = self.shape.expert_linears(layer, expert)
            keys = {spec.projection: f"{spec.module}.weight" for spec in linears if spec.projection}
            found = {name: self.find(key).key for name, key in keys.items()}
            return {name: WeightView(key, self.read(key), False) for name, key in found.items()}
        slices = {name: self._slice(fused.entries[name].key, expert) for name in FUSED}
        views: dict[Projection, WeightView] = {}
        for projection in PROJECTIONS:
            name, window = fused.name(projection), fused.window(projection)
            transposed = fused.transposed(name)
            part = slices[name][:, window] if transposed else slices[name][window]
            views[projection] = WeightView(fused.entries[name].key, part, transposed)
        return views

    def _slice(self, key: str, expert: int) -> Tensor:
        entry = self.entry(key)
        return self.read(key, expert * (entry.nbytes // entry.shape[0]), entry.shape[1:])


def read_into(file: Path, offset: int, buffer: memoryview, states: FileStates) -> None:
    """Fill ``buffer`` from ``file`` at ``offset`` through the page cache.

    Raises CheckpointError if the file is short, or not in its state of ``states`` once it has been read: what was
    read may then be another model's.
    """
    try:
        with opened(file) as descriptor:
            done = 0
            while done < len(buffer):
                count = os.preadv(descriptor, [buffer[done:]], offset + done)
                if count == 0:
                    states.check_open(file, descriptor)
                    raise CheckpointError(f"{file} ends at byte {offset + done:,}: it shrank since it was opened")
                done += count
            states.check_open(file, descriptor)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read at byte {offset:,}: {error.strerror}") from None
