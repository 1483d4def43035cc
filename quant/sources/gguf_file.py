"""A GGUF file's metadata and where its tensors lie, read with bounds: whatever the bytes are, right or one error.

Definition: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. Magic ``GGUF``,
version, counts of tensors and of metadata; metadata as name, type and value; tensors as name, dimensions (the fastest
first), type and offset; then, aligned, their bytes. A model may be split over files called
``name-00001-of-00003.gguf``: the first has the metadata, ``split.count`` says how many there are.

Legend: N out features, K in features.
"""

import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from quant.errors import CheckpointError
from quant.input_file import opened, short

_PADDING_BYTES = 2**20  # looked at at once
_MOST_BYTES = 256 * 2**20  # of metadata: a vocabulary of a million tokens has some 40 MiB
_MOST_ENTRIES, _MOST_TENSORS, _MOST_DIMS, _MOST_SPLITS, _MOST_VALUES = 2**16, 2**20, 4, 2**10, 2**23
_STEP = 2**20
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_SPLIT = re.compile(r"^(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")
_Info = tuple[str, tuple[int, ...], int, int]  # name, shape, type, offset
_TYPES = {kind.value: kind for kind in GGMLQuantizationType}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: ``shape`` with the in features last, ``row_bytes`` of one row of them, ``offset`` in ``file``."""

    name: str
    file: Path
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    row_bytes: int
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True)
class GgufFile:
    """The metadata of a model, of its first file, and the tensors of all of them."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))


def read_gguf(path: Path) -> GgufFile:
    """The model in ``path``, all files of a split one. Raises CheckpointError if they are corrupt or not whole."""
    metadata, tensors = _read_one(path)
    count = metadata.get("split.count", 1)
    if not isinstance(count, int) or not 1 <= count <= _MOST_SPLITS:
        raise CheckpointError(f"{path}: split.count is {short(count)}: expected 1 to {_MOST_SPLITS}")
    for number, file in enumerate(_others(path, count) if count > 1 else (), 1):
        its, more = _read_one(file)
        if (its.get("split.no", number), its.get("split.count", count)) != (number, count):
            raise CheckpointError(
                f"{file} says that it is part {short(its.get('split.no'))} of {short(its.get('split.count'))}, from 0 "
                f"on: expected part {number} of {count}"
            )
        for name, tensor in more.items():
            if name in tensors:
                raise CheckpointError(f"{file} and {tensors[name].file} both hold {name}: expected every tensor once")
            tensors[name] = tensor
    expected = metadata.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise CheckpointError(f"{path} and its other parts have {len(tensors)} tensors: expected {short(expected)}")
    if not isinstance(metadata.get("general.architecture"), str):
        raise CheckpointError(f"{path} has no general.architecture: expected the first file of a GGUF model")
    return GgufFile(path, metadata, tensors)


def _others(path: Path, count: int) -> Iterator[Path]:
    """The second file of a split model and those after it."""
    found = _SPLIT.match(path.name)
    if found is None or int(found["count"]) != count or int(found["number"]) != 1:
        raise CheckpointError(
            f"{path} is of a model that is split over {count} files: expected the first of them, called "
            f"NAME-00001-of-{count:05d}.gguf"
        )
    yield from (path.with_name(f"{found['name']}-{n:05d}-of-{count:05d}.gguf") for n in range(2, count + 1))


def _read_one(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    with opened(path) as descriptor:
        size = os.fstat(descriptor).st_size
        cursor = _Cursor(path, descriptor, size)
        if cursor.take(4) != b"GGUF":
            raise CheckpointError(f"{path} is no GGUF file: it does not begin with GGUF")
        version = cursor.number("I")
        if version not in (2, 3):
            raise CheckpointError(f"{path} is GGUF version {version}: expected 2 or 3, little-endian")
        tensor_count, entry_count = cursor.number("Q"), cursor.number("Q")
        if tensor_count > _MOST_TENSORS or entry_count > _MOST_ENTRIES:
            raise CheckpointError(f"{path} is corrupt: it says {tensor_count} tensors and {entry_count} entries")
        metadata: dict[str, Any] = {}
        for _ in range(entry_count):
            name = cursor.text()
            if name in metadata:
                raise CheckpointError(f"{path} is corrupt: it has {short(name)} twice")
            metadata[name] = cursor.value(cursor.number("I"))
        infos = [cursor.tensor() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if not _is_alignment(alignment):
            raise CheckpointError(f"{path}: general.alignment is {short(alignment)}: expected a power of two")
        start = -(-cursor.place // alignment) * alignment
        tensors, end = _follow(path, infos, start, alignment, size)
        _check_padding(path, descriptor, end, size)
    return metadata, tensors


def _follow(path: Path, infos: list[_Info], start: int, alignment: int, size: int) -> tuple[dict[str, GgufTensor], int]:
    """The tensors, which must lie one after the other, as llama.cpp reads them, and where they end: a wrong type or
    shape then shows."""
    tensors: dict[str, GgufTensor] = {}
    end = start
    for name, shape, kind, offset in infos:
        tensor = _placed(path, name, shape, kind, start + offset)
        state = ""
        if name in tensors:
            state = "there twice"
        elif tensor.offset != end:
            state = f"at {offset:,}: expected {end - start:,}, where the tensor before it ends"
        elif tensor.offset + tensor.nbytes > size:
            state = f"beyond the file's end at {size:,} bytes"
        if state:
            raise CheckpointError(f"{path} is truncated or corrupt: tensor {short(name)} is {state}")
        tensors[name] = tensor
        end = -(-(tensor.offset + tensor.nbytes) // alignment) * alignment
    return tensors, end


def _check_padding(path: Path, descriptor: int, end: int, size: int) -> None:
    """Zeros may follow the last tensor: padding to a block or a page. Other bytes are refused, which llama.cpp passes
    over: they are the rest of a last tensor whose type or shape is wrong, or of something else in the same file."""
    for at in range(end, size, _PADDING_BYTES):
        found = os.pread(descriptor, min(_PADDING_BYTES, size - at), at)
        if found.count(0) != len(found):
            raise CheckpointError(
                f"{path} is corrupt: after its last tensor it has {size - end:,} bytes: expected none, or zeros"
            )


def _is_alignment(value: object) -> bool:
    return type(value) is int and 1 <= value <= 2**20 and value & (value - 1) == 0


def _placed(path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
    known = _TYPES.get(kind)
    if known is None:
        raise CheckpointError(f"{path}: tensor {short(name)} is of GGML type {kind}, which is not known")
    block, block_bytes = GGML_QUANT_SIZES[known]
    if not shape or 0 in shape or shape[-1] % block:
        raise CheckpointError(
            f"{path}: tensor {short(name)} has shape {list(shape)}: expected rows of whole blocks of {block}"
        )
    return GgufTensor(name, path, known, shape, shape[-1] // block * block_bytes, offset)


class _Cursor:
    """A place in the metadata of a file, of which some more is read when it is needed."""

    def __init__(self, path: Path, descriptor: int, size: int) -> None:
        self._path, self._descriptor = path, descriptor
        self._limit = min(size, _MOST_BYTES)
        self._data = bytearray()
        self._values = 0
        self.place = 0

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        end = self.place + count
        if end > self._limit:
            raise CheckpointError(f"{self._path} is truncated or corrupt: its metadata is not whole")
        while len(self._data) < end:
            more = os.pread(self._descriptor, max(_STEP, end - len(self._data)), len(self._data))
            if not more:
                raise CheckpointError(f"{self._path} is truncated: it shrank while it was read")
            self._data += more
        taken = bytes(self._data[self.place : end])
        self.place = end
        return taken

    def number(self, form: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def text(self) -> str:
        try:
            return self.take(self.number("Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{self._path} is corrupt: a text of its metadata is not UTF-8") from None

    def value(self, kind: int, depth: int = 0) -> Any:
        """One value of metadata; an array is a list."""
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY or depth > 1:
            raise CheckpointError(f"{self._path} is corrupt: its metadata has a value of type {kind}")
        inner, count = self.number("I"), self.number("Q")
        self._values += count
        if self._values > _MOST_VALUES:
            raise CheckpointError(f"{self._path} is corrupt: its metadata has arrays of {self._values} values and more")
        if inner in _NUMBERS:
            form = _NUMBERS[inner]
            return list(struct.unpack(f"<{count}{form}", self.take(count * struct.calcsize("<" + form))))
        return [self.value(inner, depth + 1) for _ in range(count)]

    def tensor(self) -> _Info:
        """A tensor's name, shape, type and offset."""
        name, dims = self.text(), self.number("I")
        if dims > _MOST_DIMS:
            raise CheckpointError(f"{self._path} is corrupt: tensor {short(name)} has {dims} dimensions")
        shape = tuple(self.number("Q") for _ in range(dims))
        kind, offset = self.number("I"), self.number("Q")
        return name, shape[::-1], kind, offset
