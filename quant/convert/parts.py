"""A conversion as a list of parts: what to read, what to make of it, where each result goes.

A part reads one contiguous range of the source and completes the tensors, or rows of tensors, cut from it.
Parts are done in order, so that a journal of how many are done says all there is to know. A range is one
projection of one expert, or gate_proj and up_proj together where they are fused, or a block of a dense
tensor's rows.

Legend: N out features, K in features.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from quant.checkpoint.checkpoint import Checkpoint
from quant.checkpoint.config_groups import stores_fused_experts
from quant.checkpoint.layout import ITEMSIZE, CheckpointLayout, StoredTensor, fused_experts, lay_out_checkpoint
from quant.checkpoint.weight_files import TensorEntry
from quant.model.families import PROJECTIONS, Role
from quant.model.mixed_precision import scheme_of
from quant.model.shape import ModelShape
from quant.model.tensors import LinearSpec
from quant.scheme import BF16, Scheme

BLOCK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Piece:
    """One result of a part: rows ``[row, row + N)`` of ``target``, cut from what the part read.

    ``half`` says which half of a fused gate_up_proj it is. ``places`` gives, per stored suffix, the file and
    the byte where these rows begin. ``role`` and ``scheme`` are BF16 and any role for what is carried
    through, in ``dtype``.
    """

    target: str
    role: Role
    scheme: Scheme
    places: Mapping[str, tuple[str, int]]
    dtype: str
    half: Literal["", "first", "second"] = ""
    expert: int | None = None


@dataclass(frozen=True)
class Part:
    """One read: ``shape`` elements of source tensor ``key`` from ``start`` bytes in; ``transposed`` if ``[K,
    N]``. ``nbytes`` is what it takes from the source's files.
    """

    key: str
    start: int
    shape: tuple[int, ...]
    nbytes: int
    transposed: bool
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Conversion:
    """The layout of the output and the parts that fill it; ``rounded`` are the tensors that are kept, but in a
    narrower dtype."""

    layout: CheckpointLayout
    parts: tuple[Part, ...]
    rounded: tuple[str, ...] = ()

    @property
    def source_bytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


def plan_conversion(checkpoint: Checkpoint, schemes: Mapping[Role, Scheme]) -> Conversion:
    """Match every source tensor with what the config says and lay the output out.

    Nothing is read but headers, which were checked when ``checkpoint`` was opened.
    """
    shape = checkpoint.shape
    sources = {linear.module: checkpoint.find(f"{linear.module}.weight") for linear in shape.dense_linears()}
    linears = {entry.key for entry in sources.values()}
    linears.update(key for layer in shape.moe_layers for key in _expert_keys(checkpoint, layer))
    plain = [entry for key, entry in checkpoint.entries.items() if key not in linears]
    fused = stores_fused_experts(shape, schemes)
    dtypes = {module: entry.kept_dtype for module, entry in sources.items()}
    for layer in shape.moe_layers:
        found = dict(_expert_dtypes(checkpoint, layer))
        if fused and len(set(found.values())) > 1:  # what becomes one tensor is of one dtype, which holds them all
            found = dict.fromkeys(found, "F32")
        dtypes.update(found)
    stored = [StoredTensor(checkpoint.canonical(one.key), one.kept_dtype, one.shape) for one in plain]
    layout = lay_out_checkpoint(shape, schemes, stored, dtypes, fused)
    parts = list(_dense_parts(checkpoint, layout, schemes, sources, plain, dtypes))
    for layer in shape.moe_layers:
        parts.extend(_expert_parts(checkpoint, layout, schemes, layer, dtypes))
    kept = {part.key for part in parts if any(piece.scheme == BF16 for piece in part.pieces)}
    return Conversion(layout, tuple(parts), tuple(key for key in kept if checkpoint.entry(key).dtype == "F64"))


def _expert_keys(checkpoint: Checkpoint, layer: int) -> Iterator[str]:
    """The source keys of a layer's experts."""
    base = checkpoint.fused_experts(layer)
    if base is not None:
        yield from (f"{base}gate_up_proj", f"{base}down_proj")
        return
    for expert in range(checkpoint.shape.num_experts):
        for linear in checkpoint.shape.expert_linears(layer, expert):
            yield checkpoint.find(f"{linear.module}.weight").key


def _expert_dtypes(checkpoint: Checkpoint, layer: int) -> Iterator[tuple[str, str]]:
    base = checkpoint.fused_experts(layer)
    for expert in range(checkpoint.shape.num_experts):
        for linear in checkpoint.shape.expert_linears(layer, expert):
            fused = "down_proj" if linear.projection == "down_proj" else "gate_up_proj"
            key = f"{linear.module}.weight" if base is None else base + fused
            yield linear.module, checkpoint.find(key).kept_dtype


def _dense_parts(
    checkpoint: Checkpoint,
    layout: CheckpointLayout,
    schemes: Mapping[Role, Scheme],
    sources: Mapping[str, TensorEntry],
    plain: list[TensorEntry],
    dtypes: Mapping[str, str],
) -> Iterator[Part]:
    for linear in checkpoint.shape.dense_linears():
        scheme = scheme_of(schemes, linear)
        yield from _row_parts(checkpoint, layout, sources[linear.module], linear, scheme, dtypes[linear.module])
    for entry in plain:
        key = checkpoint.canonical(entry.key)
        whole = 1 if not entry.shape else entry.shape[0]
        row_bytes = entry.nbytes // max(whole, 1)
        dtype = entry.kept_dtype
        stored_bytes = row_bytes // ITEMSIZE[entry.dtype] * ITEMSIZE[dtype]
        for row, rows in _blocks(whole, row_bytes):
            file, offset = layout.place(key)
            places = {"": (file, offset + row * stored_bytes)}
            piece = Piece(key, checkpoint.names[entry.key].role, BF16, places, dtype)
            dims = (rows, *entry.shape[1:]) if entry.shape else ()
            yield Part(entry.key, row * row_bytes, dims, _file_nbytes(entry, row, rows, whole), False, (piece,))


def _file_nbytes(entry: TensorEntry, row: int, rows: int, count: int) -> int:
    """Bytes of files that ``rows`` of ``count`` rows from ``row`` on take; those of all rows add up to the whole."""
    return entry.file_nbytes * (row + rows) // max(count, 1) - entry.file_nbytes * row // max(count, 1)


def _row_parts(
    checkpoint: Checkpoint, layout: CheckpointLayout, entry: TensorEntry, linear: LinearSpec, scheme: Scheme, dtype: str
) -> Iterator[Part]:
    """Blocks of rows of one Linear that is a tensor of its own."""
    count, columns = entry.shape
    row_bytes = columns * ITEMSIZE[entry.dtype]
    for row, rows in _blocks(count, row_bytes):
        places = _places(checkpoint, layout, linear, scheme, row, dtype)
        piece = Piece(linear.module, linear.role, scheme, places, dtype, "", linear.expert)
        nbytes = _file_nbytes(entry, row, rows, count)
        yield Part(entry.key, row * row_bytes, (rows, columns), nbytes, False, (piece,))


def _expert_parts(
    checkpoint: Checkpoint,
    layout: CheckpointLayout,
    schemes: Mapping[Role, Scheme],
    layer: int,
    dtypes: Mapping[str, str],
) -> Iterator[Part]:
    shape, base = checkpoint.shape, checkpoint.fused_experts(layer)
    for expert in range(shape.num_experts):
        linears = list(shape.expert_linears(layer, expert))
        if base is None:
            for linear in linears:
                entry = checkpoint.find(f"{linear.module}.weight")
                scheme, dtype = scheme_of(schemes, linear), dtypes[linear.module]
                yield from _row_parts(checkpoint, layout, entry, linear, scheme, dtype)
            continue
        pieces: dict[str, Piece] = {}
        for projection, linear in zip(PROJECTIONS, linears, strict=True):
            half: Literal["", "first", "second"] = (
                "" if projection == "down_proj" else "first" if projection == "gate_proj" else "second"
            )
            scheme, dtype = scheme_of(schemes, linear), dtypes[linear.module]
            places = _places(checkpoint, layout, linear, scheme, 0, dtype)
            pieces[projection] = Piece(linear.module, "experts", scheme, places, dtype, half, expert)
        for name, cut in (("gate_up_proj", PROJECTIONS[:2]), ("down_proj", PROJECTIONS[2:])):
            entry = checkpoint.entry(base + name)
            size = entry.nbytes // shape.num_experts
            yield Part(
                entry.key,
                expert * size,
                entry.shape[1:],
                _file_nbytes(entry, expert, 1, shape.num_experts),
                shape.family.fused_transposed,
                tuple(pieces[projection] for projection in cut),
            )


def _places(
    checkpoint: Checkpoint, layout: CheckpointLayout, linear: LinearSpec, scheme: Scheme, row: int, dtype: str
) -> dict[str, tuple[str, int]]:
    """Where row ``row`` of ``linear`` begins in each of its stored tensors, by suffix."""
    before = row * linear.in_features  # weights of the rows above
    if scheme.is_packed:
        skip = {"weight_packed": before * scheme.bits // 8, "weight_scale": before // scheme.group_size * 2}
    elif scheme.kind == "nf4":
        skip = {"weight": before // 2, "weight.absmax": before // scheme.group_size * 4}
    else:
        skip = {"weight": before * ITEMSIZE[dtype]}
        if f"{linear.module}.weight" not in layout.weight_map:
            return {"weight": _fused_place(checkpoint.shape, layout, linear, skip["weight"], dtype)}
    found = {suffix: layout.place(f"{linear.module}.{suffix}") for suffix in skip}
    return {suffix: (file, offset + skip[suffix]) for suffix, (file, offset) in found.items()}


def _fused_place(
    shape: ModelShape, layout: CheckpointLayout, linear: LinearSpec, skip: int, dtype: str
) -> tuple[str, int]:
    """Where a dense expert's projection lies in its layer's fused tensor."""
    assert linear.layer is not None and linear.expert is not None
    gate_up, down = fused_experts(shape, linear.layer, dtype)
    tensor = down if linear.projection == "down_proj" else gate_up
    file, offset = layout.place(tensor.key)
    size = linear.weights * ITEMSIZE[dtype]
    index = linear.expert if tensor is down else 2 * linear.expert + (linear.projection == "up_proj")
    return file, offset + index * size + skip


def _blocks(rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """(first row, rows) of blocks of about 64 MiB; 64 rows at a time, so that nf4's blocks are never cut."""
    step = max(64, BLOCK_BYTES // max(row_bytes, 1) // 64 * 64)
    for row in range(0, rows, step):
        yield row, min(step, rows - row)
