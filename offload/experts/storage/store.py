"""ExpertStore: (layer, expert) → bytes on disk, in one sequential read where the file's order allows it.

A record is the image of one expert in memory: the pages read from disk, as they are, and where in them each
tensor begins. Our own checkpoints keep an expert's tensors side by side, so a record is one run of pages; a
checkpoint of another origin, or fused bf16 experts, still works with one run per neighbourhood.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from offload.experts.storage.finite import ScalePlace
from quant.checkpoint.checkpoint import DTYPES, Checkpoint
from quant.checkpoint.headers import FusedExperts
from quant.checkpoint.inventory import NF4_STATE, find_weight
from quant.checkpoint.layout import ITEMSIZE, PAGE
from quant.checkpoint.nf4_state import check_nf4_state
from quant.checkpoint.weight_files import TensorEntry
from quant.kernels.moe import reads_bias
from quant.linear import LinearWeight
from quant.model.families import Projection
from quant.model.tensors import LinearSpec
from quant.scheme import Scheme
from quant.sizes import format_size

Layout = tuple[tuple[str, str, int, str, tuple[int, ...]], ...]
_JOIN_GAP = 64 * 1024
_SCALES = ("bias", "weight_scale", "weight.absmax", "weight.quant_map")


@dataclass(frozen=True)
class ByteRange:
    """One contiguous read: ``length`` bytes at ``offset`` of ``file`` go to ``position`` of the slot. All
    three are multiples of the page size, so the read satisfies direct I/O; ``needed`` is where the expert's
    last byte ends (the file may end before ``length`` does). A tensor that begins in the file where none can be
    used has a range of its own, whose ``offset`` is that place."""

    file: Path
    offset: int
    length: int
    position: int
    needed: int

    @property
    def is_direct(self) -> bool:
        """Whether direct I/O can read it."""
        return self.offset % PAGE == 0


@dataclass(frozen=True)
class TensorPlace:
    """Where one tensor begins in a slot, and what it is."""

    position: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class WeightPlace:
    """How one projection, a weight ``[out, in]`` of ``shape``, lies in a slot: its tensors by checkpoint suffix.
    ``transposed`` for ``[in, out]`` sources; ``window`` is its part of a tensor that is several projections, and
    ``bias_window`` that of their biases."""

    scheme: Scheme
    shape: tuple[int, int]
    transposed: bool = False
    window: tuple[slice, ...] = ()
    bias_window: slice = field(default_factory=lambda: slice(None))
    tensors: Mapping[str, TensorPlace] = field(default_factory=dict)

    def view(self, slot: Tensor) -> LinearWeight:
        """The weight as views into ``slot`` (uint8, one dimension)."""
        tensors: dict[str, Tensor] = {}
        for suffix, place in self.tensors.items():
            dtype = DTYPES[place.dtype]
            nbytes = dtype.itemsize * math.prod(place.shape)
            tensors[suffix] = slot[place.position : place.position + nbytes].view(dtype).view(place.shape)
        if self.window:
            tensors["weight"] = tensors["weight"][self.window]
        if "bias" in tensors:
            tensors["bias"] = tensors["bias"][self.bias_window]
        return LinearWeight(self.scheme, tensors, *self.shape, self.transposed)


@dataclass(frozen=True)
class ExpertRecord:
    """One expert as it lies on disk and in a slot. ``nbytes`` counts what a forward pass reads of it; ``scales``
    are what must be numbers for it to be one."""

    runs: tuple[ByteRange, ...]
    weights: Mapping[Projection, WeightPlace]
    nbytes: int
    scales: tuple[ScalePlace, ...] = ()

    @cached_property
    def slot_bytes(self) -> int:
        """Bytes of memory the record takes, a multiple of the page size."""
        return sum(run.length for run in self.runs)

    @cached_property
    def start(self) -> int:
        """Where in a slot the first of the expert's bytes lies."""
        return min(tensor.position for place in self.weights.values() for tensor in place.tensors.values())

    @cached_property
    def layout(self) -> "Layout":
        """Equal for records whose tensors lie at the same places of a slot."""
        return tuple(
            (name, suffix, tensor.position, tensor.dtype, tensor.shape)
            for name, place in self.weights.items()
            for suffix, tensor in place.tensors.items()
        )

    def view(self, slot: Tensor) -> "ExpertWeights":
        """The expert's weights as views into ``slot``."""
        views = {name: place.view(slot) for name, place in self.weights.items()}
        return ExpertWeights(views["gate_proj"], views["up_proj"], views["down_proj"])


@dataclass(frozen=True)
class ExpertWeights:
    """The three Linears of one resident expert."""

    gate_proj: LinearWeight
    up_proj: LinearWeight
    down_proj: LinearWeight


class ExpertStore:
    """All routed experts of one checkpoint, by (layer, expert). Opening reads no weights."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.shape = checkpoint.shape
        self._records: dict[tuple[int, int], ExpertRecord] = {}

    def record(self, layer: int, expert: int) -> ExpertRecord:
        """The record of one expert. Raises CheckpointError if a tensor of it is absent or has another
        shape."""
        key = (layer, expert)
        if key not in self._records:
            self._records[key] = self._build(layer, expert)
        return self._records[key]

    @cached_property
    def slot_bytes(self) -> int:
        """Bytes of a slot that holds any expert."""
        return max((self.record(*key).slot_bytes for key in self.experts()), default=PAGE)

    @cached_property
    def least_slot_bytes(self) -> int:
        """Bytes of a slot that holds the smallest expert."""
        return min((self.record(*key).slot_bytes for key in self.experts()), default=PAGE)

    @cached_property
    def count(self) -> int:
        """How many experts there are in all layers."""
        return len(self.shape.moe_layers) * self.shape.num_experts

    def experts(self) -> list[tuple[int, int]]:
        """Every (layer, expert), as they lie on disk."""
        return [(layer, expert) for layer in self.shape.moe_layers for expert in range(self.shape.num_experts)]

    @cached_property
    def expert_nbytes(self) -> int | None:
        """Bytes of any expert, or None if they differ."""
        sizes = {self.record(*key).nbytes for key in self.experts()}
        return sizes.pop() if len(sizes) == 1 else None

    @cached_property
    def reads_native(self) -> bool:
        """Whether the native kernels read experts that are stored like the first."""
        for record in (self.record(*key) for key in self.experts()[:1]):
            one = record.view(torch.empty(record.slot_bytes, dtype=torch.uint8))
            return all(w.descriptor is not None for w in (one.gate_proj, one.up_proj, one.down_proj))
        return True

    @cached_property
    def reads_biases(self) -> bool:
        """Whether the native kernels read the biases of experts that are stored like the first where they lie."""
        for record in (self.record(*key) for key in self.experts()[:1]):
            one = record.view(torch.empty(record.slot_bytes, dtype=torch.uint8))
            three = (one.gate_proj, one.up_proj, one.down_proj)
            return all(reads_bias(weight.tensors["bias"]) for weight in three if "bias" in weight.tensors)
        return True

    @cached_property
    def notes(self) -> list[str]:
        """What has to be said of where the experts lie in their files, for a run that would read them directly."""
        buffered = sum(run.needed for key in self.experts() for run in self.record(*key).runs if not run.is_direct)
        if not buffered:
            return []
        return [
            f"{format_size(buffered)} of experts begin in their files where direct I/O cannot read them: they are read "
            "through the page cache, which copies every byte once more and takes memory beyond --ram; what `coldstream "
            "quantize` writes has no such places"
        ]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all experts."""
        return sum(self.record(*key).nbytes for key in self.experts())

    def _build(self, layer: int, expert: int) -> ExpertRecord:
        stored = self._stored(layer, expert)
        entries = {id(entry): entry for _, tensors in stored.values() for entry in tensors.values()}
        runs, positions = _runs(list(entries.values()))
        weights: dict[Projection, WeightPlace] = {}
        for name, (place, tensors) in stored.items():
            places = {
                key: TensorPlace(positions[id(entry)], entry.dtype, entry.shape) for key, entry in tensors.items()
            }
            weights[name] = replace(place, tensors=places)
        scales = tuple(
            ScalePlace(entry.key, positions[id(entry)], entry.nbytes, entry.dtype)
            for _, tensors in stored.values()
            for suffix, entry in tensors.items()
            if suffix in _SCALES
        )
        return ExpertRecord(runs, weights, sum(entry.nbytes for entry in entries.values()), scales)

    def _stored(self, layer: int, expert: int) -> "dict[Projection, _Stored]":
        fused = self.checkpoint.fused_experts(layer)
        if fused is not None:
            return self._fused(fused, layer, expert)
        found: dict[Projection, _Stored] = {}
        for spec in self.shape.expert_linears(layer, expert):
            scheme, tensors = find_weight(self.checkpoint, spec)
            assert spec.projection is not None
            if scheme.kind == "nf4":
                check_nf4_state(self.checkpoint, tensors[NF4_STATE], _dims(spec))
            bias = {"bias": self.checkpoint.find(f"{spec.module}.bias")} if spec.bias else {}
            found[spec.projection] = WeightPlace(scheme, _dims(spec)), {**tensors, **bias}
        return found

    def _fused(self, fused: FusedExperts, layer: int, expert: int) -> "dict[Projection, _Stored]":
        slices = {name: _slice(entry, expert) for name, entry in fused.entries.items()}
        found: dict[Projection, _Stored] = {}
        for spec in self.shape.expert_linears(layer, expert):
            assert spec.projection is not None
            name, features = fused.name(spec.projection), fused.window(spec.projection)
            transposed = fused.transposed(name)
            window = (slice(None), features) if transposed else (features,)
            tensors = {"weight": slices[name]}
            if spec.bias:
                tensors["bias"] = slices[f"{name}_bias"]
            place = WeightPlace(_PLAIN, _dims(spec), transposed, window, bias_window=features)
            found[spec.projection] = place, tensors
        return found


_PLAIN = Scheme("bf16")
_Stored = tuple[WeightPlace, Mapping[str, TensorEntry]]  # a projection, its tensors not placed yet, and those


def _dims(spec: LinearSpec) -> tuple[int, int]:
    return spec.out_features, spec.in_features


def _slice(entry: TensorEntry, index: int) -> TensorEntry:
    nbytes = entry.nbytes // entry.shape[0]
    return TensorEntry(entry.key, entry.file, entry.dtype, entry.shape[1:], entry.offset + index * nbytes, nbytes)


def _runs(entries: list[TensorEntry]) -> tuple[tuple[ByteRange, ...], dict[int, int]]:
    """Reads that cover ``entries``, and the slot position of each by ``id``."""
    groups: list[list[TensorEntry]] = []
    for entry in sorted(entries, key=lambda e: (e.file, e.offset)):
        near = groups and groups[-1][0].file == entry.file and entry.offset - _end(groups[-1]) <= _JOIN_GAP
        if near and _is_aligned(entry) and _is_aligned(groups[-1][0]):
            groups[-1].append(entry)
        else:
            groups.append([entry])
    runs: list[ByteRange] = []
    positions: dict[int, int] = {}
    slot = 0
    for group in groups:
        start = group[0].offset // PAGE * PAGE if _is_aligned(group[0]) else group[0].offset
        needed = _end(group) - start
        runs.append(ByteRange(group[0].file, start, -(-needed // PAGE) * PAGE, slot, needed))
        positions |= {id(entry): slot + entry.offset - start for entry in group}
        slot += runs[-1].length
    return tuple(runs), positions


def _is_aligned(entry: TensorEntry) -> bool:
    """Whether the tensor can be used at its place in a page. The format lets data begin anywhere."""
    return entry.offset % ITEMSIZE[entry.dtype] == 0


def _end(group: list[TensorEntry]) -> int:
    return max(entry.offset + entry.nbytes for entry in group)
