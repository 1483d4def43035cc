"""A conversion as a list of parts: what to read, what to make of it, where each result goes.

A part reads one contiguous range of the source and completes the tensors, or rows of tensors, cut from it.
Parts are done in order, so that a journal of how many are done says all there is to know. A range is one
projection of one expert, or gate_proj and up_proj together where they are fused, or a block of a dense
tensor's rows.

Legend: N out features, K in features.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from quant.checkpoint.checkpoint import Checkpoint
from quant.checkpoint.config_groups import stores_fused_experts
from quant.checkpoint.headers import FUSED, FusedExperts
from quant.checkpoint.layout import (
    ITEMSIZE,
    CheckpointLayout,
    StoredTensor,
    fused_experts,
    lay_out_checkpoint,
    quantized_vision,
)
from quant.checkpoint.weight_files import TensorEntry
from quant.model.families import PROJECTIONS, Projection, Role
from quant.model.mixed_precision import scheme_of
from quant.model.shape import ModelShape
from quant.model.tensors import LinearSpec
from quant.scheme import BF16, Scheme

BLOCK_BYTES = 16 * 2**20  # the floats of a block stay in the cache, and in memory that the process has already


def _whole() -> slice:
    return slice(None)


@dataclass(frozen=True)
class Piece:
    """One result of a part: rows ``[row, row + N)`` of ``target``, cut from what the part read.

    ``window`` are the out features of what was read that are its own. ``places`` gives, per stored suffix, the file and
    the byte where these rows begin. ``role`` and ``scheme`` are BF16 and any role for what is carried
    through, in ``dtype``.
    """

    target: str
    role: Role
    scheme: Scheme
    places: Mapping[str, tuple[str, int]]
    dtype: str
    window: slice = field(default_factory=_whole)
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
    dense = [*shape.dense_linears(), *quantized_vision(shape, schemes)]
    sources = {linear.module: checkpoint.find(f"{linear.module}.weight") for linear in dense}
    linears = {entry.key for entry in sources.values()}
    kept = keeps_fused_experts(checkpoint, schemes)
    layers = () if kept else shape.moe_layers
    linears.update(key for layer in layers for key in _expert_keys(checkpoint, layer))
    plain = [entry for key, entry in checkpoint.entries.items() if key not in linears]
    fused = not kept and stores_fused_experts(shape, schemes)
    dtypes = {module: entry.kept_dtype for module, entry in sources.items()}
    for layer in layers:
        found = dict(_expert_dtypes(checkpoint, layer))
        if fused and len(set(found.values())) > 1:  # what becomes one tensor is of one dtype, which holds them all
            found = dict.fromkeys(found, "F32")
        dtypes.update(found)
    stored = [StoredTensor(checkpoint.canonical(one.key), one.kept_dtype, one.shape) for one in plain]
    layout = lay_out_checkpoint(shape, schemes, stored, dtypes, fused, layers)
    parts = list(_dense_parts(checkpoint, layout, schemes, dense, sources, plain, dtypes))
    for layer in layers:
        parts.extend(_expert_parts(checkpoint, layout, schemes, layer, dtypes))
    kept_keys = {part.key for part in parts if any(piece.scheme == BF16 for piece in part.pieces)}
    return Conversion(layout, tuple(parts), tuple(key for key in kept_keys if checkpoint.entry(key).dtype == "F64"))


def keeps_fused_experts(checkpoint: Checkpoint, schemes: Mapping[Role, Scheme]) -> bool:
    """Whether experts stay as the source has them: dense, and fused in a form that is the family's own."""
    if checkpoint.shape.is_native or schemes.get("experts", BF16) != BF16:
        return False
    return any(checkpoint.fused_experts(layer) is not None for layer in checkpoint.shape.moe_layers)


def _expert_keys(checkpoint: Checkpoint, layer: int) -> Iterator[str]:
    """The source keys of a layer's experts."""
    fused = checkpoint.fused_experts(layer)
    if fused is not None:
        yield from (entry.key for entry in fused.entries.values())
        return
    for expert in range(checkpoint.shape.num_experts):
        for linear in checkpoint.shape.expert_linears(layer, expert):
            yield checkpoint.find(f"{linear.module}.weight").key
            if linear.bias:
                yield checkpoint.find(f"{linear.module}.bias").key


def _expert_dtypes(checkpoint: Checkpoint, layer: int) -> Iterator[tuple[str, str]]:
    fused = checkpoint.fused_experts(layer)
    for expert in range(checkpoint.shape.num_experts):
        for linear in checkpoint.shape.expert_linears(layer, expert):
            assert linear.projection is not None
            if fused is None:
                yield linear.module, checkpoint.find(f"{linear.module}.weight").kept_dtype
            else:
                yield linear.module, fused.entries[fused.name(linear.projection)].kept_dtype
            if linear.bias:
                key = f"{linear.module}.bias"
                bias = checkpoint.find(key) if fused is None else fused.entries[f"{fused.name(linear.projection)}_bias"]
                yield key, bias.kept_dtype


def _dense_parts(
    checkpoint: Checkpoint,
    layout: CheckpointLayout,
    schemes: Mapping[Role, Scheme],
    dense: Sequence[LinearSpec],
    sources: Mapping[str, TensorEntry],
    plain: list[TensorEntry],
    dtypes: Mapping[str, str],
) -> Iterator[Part]:
    for linear in dense:
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
        piece = Piece(linear.module, linear.role, scheme, places, dtype, slice(None), linear.expert)
        nbytes = _file_nbytes(entry, row, rows, count)
        yield Part(entry.key, row * row_bytes, (rows, columns), nbytes, False, (piece,))


def _expert_parts(
    checkpoint: Checkpoint,
    layout: CheckpointLayout,
    schemes: Mapping[Role, Scheme],
    layer: int,
    dtypes: Mapping[str, str],
) -> Iterator[Part]:
    shape, fused = checkpoint.shape, checkpoint.fused_experts(layer)
    for expert in range(shape.num_experts):
        linears = list(shape.expert_linears(layer, expert))
        if fused is None:
            for linear in linears:
                entry = checkpoint.find(f"{linear.module}.weight")
                scheme, dtype = scheme_of(schemes, linear), dtypes[linear.module]
                yield from _row_parts(checkpoint, layout, entry, linear, scheme, dtype)
                if linear.bias:
                    bias = checkpoint.find(f"{linear.module}.bias")
                    piece = _bias_piece(layout, linear, bias, slice(None))
                    yield Part(bias.key, 0, bias.shape, bias.file_nbytes, False, (piece,))
            continue
        pieces: dict[Projection, Piece] = {}
        for projection, linear in zip(PROJECTIONS, linears, strict=True):
            scheme, dtype = scheme_of(schemes, linear), dtypes[linear.module]
            places = _places(checkpoint, layout, linear, scheme, 0, dtype)
            pieces[projection] = Piece(
                linear.module, "experts", scheme, places, dtype, fused.window(projection), expert
            )
        for name in FUSED:
            entry = fused.entries[name]
            size = entry.nbytes // shape.num_experts
            cut = tuple(piece for projection, piece in pieces.items() if fused.name(projection) == name)
            nbytes = _file_nbytes(entry, expert, 1, shape.num_experts)
            yield Part(entry.key, expert * size, entry.shape[1:], nbytes, fused.transposed(name), cut)
        if fused.form.has_bias:
            yield from _fused_bias_parts(layout, fused, linears, expert)


def _fused_bias_parts(
    layout: CheckpointLayout, fused: FusedExperts, linears: Sequence[LinearSpec], expert: int
) -> Iterator[Part]:
    for name in FUSED:
        entry = fused.entries[f"{name}_bias"]
        size = entry.nbytes // entry.shape[0]
        cut = []
        for linear in linears:
            assert linear.projection is not None
            if fused.name(linear.projection) == name:
                cut.append(_bias_piece(layout, linear, entry, fused.window(linear.projection)))
        nbytes = _file_nbytes(entry, expert, 1, entry.shape[0])
        yield Part(entry.key, expert * size, entry.shape[1:], nbytes, False, tuple(cut))


def _bias_piece(layout: CheckpointLayout, linear: LinearSpec, entry: TensorEntry, window: slice) -> Piece:
    """A bias of an expert, as it is."""
    places = {"": layout.place(f"{linear.module}.bias")}
    return Piece(linear.module, "experts", BF16, places, entry.kept_dtype, window, linear.expert)


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
    """(first row, rows) of blocks of about 16 MiB; 64 rows at a time, so that nf4's blocks are never cut."""
    step = max(64, BLOCK_BYTES // max(row_bytes, 1) // 64 * 64)
    for row in range(0, rows, step):
        yield row, min(step, rows - row)
