"""Which files of a directory are the model, and what their headers say. Needs no torch.

The rule is transformers': ``model.safetensors`` if it is there, else the shards that
``model.safetensors.index.json`` names. Nothing else in the directory is part of the model, whatever it is
called: a backup, an adapter, an importance matrix, the same weights in another layout.

A safetensors file is eight bytes with the header's length, the header (JSON, padded with spaces), and the
tensors' bytes without a hole or an overlap (https://github.com/huggingface/safetensors, "Format"). Where the
bytes begin need not be a multiple of anything.
"""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter

from quant.checkpoint.layout import ITEMSIZE
from quant.errors import CheckpointError
from quant.input_file import is_there, opened, parse_json, read_object, validated

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADER = 100 * 2**20  # safetensors' own limit
_MAX_DIMS = 8
_OTHERS = (".safetensors", ".gguf", ".bin", ".pth", ".pt")
_NAMED = 3

_Size = Annotated[int, Field(ge=0, le=2**62)]
_Shard = Annotated[str, StringConstraints(pattern=r"^[^/\x00]+\.safetensors$")]


class _Tensor(BaseModel):
    """One entry of a header; ``data_offsets`` count from the end of the header."""

    model_config = ConfigDict(strict=True, extra="forbid")
    dtype: str
    shape: Annotated[list[_Size], Field(max_length=_MAX_DIMS)]
    data_offsets: Annotated[list[_Size], Field(min_length=2, max_length=2)]


class _Index(BaseModel):
    """``model.safetensors.index.json``: which shard holds each tensor. Transformers, which loads what is not an expert,
    reads no index without ``metadata``."""

    model_config = ConfigDict(strict=True, extra="ignore")
    weight_map: Annotated[dict[str, _Shard], Field(min_length=1)]
    metadata: dict[str, Any]


_HEADER = TypeAdapter(dict[str, _Tensor])
_METADATA = TypeAdapter(dict[str, str], config=ConfigDict(strict=True))


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: ``offset`` counts bytes from the start of ``file``."""

    key: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def kept_dtype(self) -> str:
        """What it is stored in where a conversion keeps it: the same, but f32 for f64, in which nothing computes."""
        return "F32" if self.dtype == "F64" else self.dtype

    @property
    def file_nbytes(self) -> int:
        """Bytes that reading it takes from files."""
        return self.nbytes


def model_entries(path: Path) -> dict[str, TensorEntry]:
    """Every tensor of the model in directory ``path``, by key.

    Raises CheckpointError if it has no such files, or one of them is missing, truncated or corrupt.
    """
    index = path / INDEX
    single = path / SINGLE
    if is_there(single):
        return read_header(single)[0]
    if not is_there(index):
        raise CheckpointError(f"{path} has no {SINGLE} and no {INDEX}: {_there(path)}")
    found = validated(_Index, read_object(index, "a safetensors index"), str(index))
    return _joined(found.weight_map, {name: path / name for name in sorted(set(found.weight_map.values()))}, index)


def _there(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir() if entry.name.endswith(_OTHERS))
    if not names:
        return "it has no *.safetensors file; expected a Hugging Face model directory with its weights"
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return (
        f"found {', '.join(names[:_NAMED])}{more}, which transformers would not read either; expected a Hugging "
        "Face model directory"
    )


def _joined(weight_map: Mapping[str, str], files: Mapping[str, Path], index: Path) -> dict[str, TensorEntry]:
    """The tensors of all shards. What a shard holds beyond what the index says is part of the model, too: it is
    loaded by transformers, and is refused later if it has no place."""
    entries: dict[str, TensorEntry] = {}
    for file in files.values():
        for key, entry in read_header(file)[0].items():
            if key in entries:
                raise CheckpointError(
                    f"{file.name} and {entries[key].file.name} in {index.parent} both hold {key}: expected every "
                    "tensor once"
                )
            entries[key] = entry
    for key, name in weight_map.items():
        if key not in entries or entries[key].file.name != name:
            raise CheckpointError(f"{index} says that {name} holds {key}, but it does not: the download is not whole")
    return entries


def read_header(file: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The tensors of one safetensors file by key, and its metadata.

    Raises CheckpointError if the file is missing, truncated or not safetensors.
    """
    with opened(file) as descriptor:
        size = os.fstat(descriptor).st_size
        prefix = os.pread(descriptor, 8, 0)
        length = int.from_bytes(prefix, "little") if len(prefix) == 8 else _MAX_HEADER + 1
        if length > min(_MAX_HEADER, size - 8):
            raise CheckpointError(f"{file} is truncated or no safetensors file: its header is not whole")
        data = os.pread(descriptor, length, 8)
    if len(data) != length:
        raise CheckpointError(f"{file} is truncated: it shrank while its header was read")
    if not data.startswith(b"{"):
        raise CheckpointError(f"{file} is corrupt: its safetensors header does not parse (expected a JSON object)")
    header: dict[str, Any] = parse_json(data, f"{file} is corrupt: its safetensors header does not parse; it")
    start = 8 + length
    metadata: dict[str, str] = validated(_METADATA, header.pop("__metadata__", {}), f"{file}: its metadata")
    tensors: dict[str, _Tensor] = validated(
        _HEADER, header, f"{file} is corrupt: its safetensors header does not parse"
    )
    entries = {key: _entry(file, key, tensor, start) for key, tensor in tensors.items()}
    _check_contiguous(file, entries.values(), start, size)
    return entries, metadata


def _entry(file: Path, key: str, tensor: _Tensor, base: int) -> TensorEntry:
    start, end = tensor.data_offsets
    if tensor.dtype not in ITEMSIZE:
        raise CheckpointError(
            f"{file}: tensor {key} has dtype {tensor.dtype!r}: expected one of {', '.join(sorted(ITEMSIZE))}"
        )
    expected = math.prod(tensor.shape) * ITEMSIZE[tensor.dtype]
    if end - start != expected:
        raise CheckpointError(f"{file} is corrupt: tensor {key} spans {end - start:,} bytes, expected {expected:,}")
    return TensorEntry(key, file, tensor.dtype, tuple(tensor.shape), base + start, expected)


def _check_contiguous(file: Path, entries: Iterable[TensorEntry], start: int, size: int) -> None:
    """Refuse tensors that overlap or leave a hole, and a file that does not end with the last one."""
    end, before = start, "the header"
    for entry in sorted(entries, key=lambda one: (one.offset, one.nbytes)):
        if entry.offset != end:
            fault = "overlaps" if entry.offset < end else "does not follow"
            raise CheckpointError(f"{file} is corrupt: tensor {entry.key} {fault} {before}")
        end, before = entry.offset + entry.nbytes, entry.key
    if end != size:
        state = "truncated" if size < end else "longer than its header says"
        raise CheckpointError(f"{file} is {state}: found {size:,} bytes, expected {end:,}; download it again")
