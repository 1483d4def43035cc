"""A Hugging Face checkpoint read lazily: headers first, then one tensor, or one expert's slice, at a time.

Files are read with ``pread`` into buffers of our own. Mapping them would be less code, but mapped pages count
as resident memory, and a converter that promises a bound must not depend on when the kernel takes them back.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.errors import CheckpointError
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
_MAX_HEADER = 100 * 2**20


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: ``offset`` counts bytes from the start of ``file``."""

    key: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class WeightView:
    """One Linear's dense weight: ``[N, K]``, or ``[K, N]`` where ``transposed``; rows may be strided."""

    key: str
    tensor: Tensor
    transposed: bool

    def dense(self) -> Tensor:
        """The weight as ``[N, K]``."""
        return self.tensor.t() if self.transposed else self.tensor


def read_header(file: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The tensors of one safetensors file by key, and its metadata.

    Raises CheckpointError if the file is missing, truncated or not safetensors.
    """
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER + 1
            if length > min(_MAX_HEADER, size - 8):
                raise CheckpointError(f"{file} is truncated or no safetensors file: its header is not whole")
            header: dict[str, Any] = json.loads(stream.read(length))
        metadata: dict[str, str] = header.pop("__metadata__", {})
        entries = {key: _entry(file, key, value, 8 + length) for key, value in header.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing: expected every shard that the index names") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is corrupt: its safetensors header does not parse ({error})") from None
    end = max((entry.offset + entry.nbytes for entry in entries.values()), default=8 + length)
    if end != size:
        state = "truncated" if size < end else "longer than its header says"
        raise CheckpointError(f"{file} is {state}: found {size:,} bytes, expected {end:,}; download it again")
    return entries, metadata


def _entry(file: Path, key: str, value: Mapping[str, Any], base: int) -> TensorEntry:
    start, end = value["data_offsets"]
    shape, dtype = tuple(int(size) for size in value["shape"]), value["dtype"]
    if dtype not in DTYPES:
        raise CheckpointError(f"{file}: tensor {key} has dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if end - start != expected or start < 0:
        raise CheckpointError(f"{file} is corrupt: tensor {key} spans {end - start:,} bytes, expected {expected:,}")
    return TensorEntry(key, file, dtype, shape, base + start, expected)


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
        index = path / "model.safetensors.index.json"
        if not index.exists():
            files = sorted(path.glob("*.safetensors"))
            if not files:
                raise CheckpointError(f"{path} has no *.safetensors file: expected a Hugging Face model directory")
            entries: dict[str, TensorEntry] = {}
            for file in files:
                entries.update(read_header(file)[0])
            return cls(path, config, entries)
        return cls(path, config, _read_sharded(path, index))

    @property
    def is_quantized(self) -> bool:
        text = self.config.get("text_config") or {}
        return "quantization_config" in self.config or "quantization_config" in text

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


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a model directory. Raises CheckpointError if it is absent or no JSON object."""
    file = path / "config.json"
    try:
        config = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        what = "no config.json in it" if path.is_dir() else "a file" if path.exists() else "no such directory"
        raise CheckpointError(f"{path}: {what}; expected a Hugging Face model directory") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} is no JSON object: expected a model's config")
    return config


def read_into(file: Path, offset: int, buffer: memoryview) -> None:
    """Fill ``buffer`` from ``file`` at ``offset`` through the page cache. Raises CheckpointError if short."""
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be opened: {error.strerror}") from None
    try:
        done = 0
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
            if count == 0:
                raise CheckpointError(f"{file} ends at byte {offset + done:,}: it shrank since it was opened")
            done += count
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read at byte {offset:,}: {error.strerror}") from None
    finally:
        os.close(descriptor)


def _read_sharded(path: Path, index: Path) -> dict[str, TensorEntry]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is no safetensors index: {error!r}") from None
    shards = {name: read_header(path / name)[0] for name in sorted(set(weight_map.values()))}
    entries: dict[str, TensorEntry] = {}
    for key, name in weight_map.items():
        if key not in shards[name]:
            raise CheckpointError(f"{index} says that {name} holds {key}, but it does not: the download is not whole")
        entries[key] = shards[name][key]
    return entries
