"""A Hugging Face checkpoint read lazily: headers first, then one tensor, or one expert's slice, at a time.

Files are read with ``pread`` into buffers of our own. Mapping them would be less code, but mapped pages count
as resident memory, and a converter that promises a bound must not depend on when the kernel takes them back.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.checkpoint.weight_files import TensorEntry, model_entries
from quant.errors import CheckpointError
from quant.input_file import opened
from quant.model.config import quantization_of, read_config
from quant.model.families import Projection, TensorName, parse_name
from quant.model.shape import ModelShape

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


class Checkpoint:
    """One model directory: config, shape and the place of every tensor. Opening reads headers only."""

    def __init__(self, path: Path, config: dict[str, Any], entries: dict[str, TensorEntry]) -> None:
        self.path = path
        self.config = config
        self.entries = entries
        self.shape = ModelShape.from_config(config)

    @classmethod
    def open(cls, path: Path | str) -> "Checkpoint":
        """Read config.json, the index and all headers. Raises CheckpointError or UnknownFamilyError."""
        path = Path(path)
        config = read_config(path)
        ModelShape.from_config(config)  # an unknown family is the clearest thing to say first
        return cls(path, config, model_entries(path))

    @property
    def is_quantized(self) -> bool:
        return quantization_of(self.config) is not None

    @cached_property
    def names(self) -> dict[str, TensorName]:
        """What each key is. Raises CheckpointError for a key the family does not explain."""
        names: dict[str, TensorName] = {}
        for key in self.entries:
            name = parse_name(self.shape.family, key)
            if name is None:
                raise CheckpointError(
                    f"{self.path}: tensor {key} is not part of a {self.shape.family.name} model: expected "
                    "the key layout that transformers saves"
                )
            names[key] = name
        return names

    @cached_property
    def identity(self) -> str:
        """A hash over the config and every header: 16 hex digits that change when a tensor's place or the
        architecture does, cheap enough to take at every start."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for key in sorted(self.entries):
            entry = self.entries[key]
            digest.update(f"{key}{entry.dtype}{entry.shape}{entry.offset}{entry.file.name}".encode())
        return digest.hexdigest()[:16]

    def entry(self, key: str) -> TensorEntry:
        """The entry of ``key``. Raises CheckpointError if the checkpoint lacks it."""
        try:
            return self.entries[key]
        except KeyError:
            raise CheckpointError(f"{self.path} has no tensor {key}: expected it for this architecture") from None

    def find(self, key: str) -> TensorEntry:
        """The entry of ``key``, also where the source names the MoE block as the transformers module does.

        Raises CheckpointError if the checkpoint lacks it under both names.
        """
        family = self.shape.family
        alias = key.replace(f".{family.block}.", f".{family.runtime_block}.")
        return self.entry(alias if key not in self.entries and alias in self.entries else key)

    def canonical(self, key: str) -> str:
        """The key that a quantized checkpoint gives tensor ``key``: the family's name for its MoE block."""
        if self.names[key].role != "router":
            return key
        return key.replace(f".{self.shape.family.runtime_block}.", f".{self.shape.family.block}.")

    def fused_experts(self, layer: int) -> str | None:
        """The key prefix of a layer's fused expert tensors; None where experts are stored one by one."""
        family, prefix = self.shape.family, self.shape.layer_prefix(layer)
        bases = (f"{prefix}{block}.experts." for block in (family.block, family.runtime_block))
        return next((base for base in bases if f"{base}gate_up_proj" in self.entries), None)

    def read(self, key: str, start: int = 0, shape: tuple[int, ...] | None = None) -> Tensor:
        """A copy of tensor ``key``, or of ``shape`` elements of it that begin ``start`` bytes in.

        Raises CheckpointError if the tensor is absent or the file shrank.
        """
        entry = self.entry(key)
        dtype = DTYPES[entry.dtype]
        wanted = entry.shape if shape is None else shape
        tensor = torch.empty(wanted, dtype=dtype)
        if tensor.numel():
            array: Any = tensor.view(-1).view(torch.uint8).numpy()
            read_into(entry.file, entry.offset + start, memoryview(array))
        return tensor

    def expert(self, layer: int, expert: int) -> dict[Projection, WeightView]:
        """The three dense weights of one routed expert, read from fused or per-expert tensors."""
        fused = self.fused_experts(layer)
        if fused is None:
            linears = self.shape.expert_linears(layer, expert)
            keys = {spec.projection: f"{spec.module}.weight" for spec in linears if spec.projection}
            found = {name: self.find(key).key for name, key in keys.items()}
            return {name: WeightView(key, self.read(key), False) for name, key in found.items()}
        gate_up = self._slice(f"{fused}gate_up_proj", expert)
        down = self._slice(f"{fused}down_proj", expert)
        transposed = self.shape.family.fused_transposed
        gate, up = gate_up.chunk(2, dim=1 if transposed else 0)
        return {
            "gate_proj": WeightView(f"{fused}gate_up_proj", gate, transposed),
            "up_proj": WeightView(f"{fused}gate_up_proj", up, transposed),
            "down_proj": WeightView(f"{fused}down_proj", down, transposed),
        }

    def _slice(self, key: str, expert: int) -> Tensor:
        entry = self.entry(key)
        return self.read(key, expert * (entry.nbytes // entry.shape[0]), entry.shape[1:])


def read_into(file: Path, offset: int, buffer: memoryview) -> None:
    """Fill ``buffer`` from ``file`` at ``offset`` through the page cache. Raises CheckpointError if short."""
    try:
        with opened(file) as descriptor:
            done = 0
            while done < len(buffer):
                count = os.preadv(descriptor, [buffer[done:]], offset + done)
                if count == 0:
                    raise CheckpointError(f"{file} ends at byte {offset + done:,}: it shrank since it was opened")
                done += count
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read at byte {offset:,}: {error.strerror}") from None
