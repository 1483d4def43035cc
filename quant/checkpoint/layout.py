"""Where each byte of a quantized checkpoint lies: page-aligned safetensors files, computed before any is
written.

One file holds everything but the routed experts; then comes one file per MoE layer with that layer's experts,
0 to E-1. An expert's tensors lie side by side in the order gate_proj, up_proj, down_proj (packed values, then
their scales), so that fetching it is one sequential read. The header is padded with spaces so that data
begins on a page boundary: expert e starts at ``data_start + e * expert_nbytes``, which direct I/O can read
where that is a multiple of 4096.

The safetensors format allows no holes. Tensors whose size would shift what follows off its alignment, among
them every ``weight_shape``, therefore go to the end of their file.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from quant.model.families import Role
from quant.model.mixed_precision import scheme_of
from quant.model.shape import ModelShape
from quant.model.tensors import LinearSpec
from quant.scheme import BF16, NF4_BLOCK, Scheme

PAGE = 4096
ITEMSIZE: Mapping[str, int] = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "BF16": 2,
    "F16": 2,
    "I16": 2,
    "U8": 1,
    "I8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}
_NF4_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of an output file: key, safetensors dtype and shape."""

    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class FileLayout:
    """One output file: its name, its padded header, and where each tensor starts (bytes from the file's
    start).
    """

    name: str
    header: bytes
    offsets: Mapping[str, int]
    nbytes: int

    @property
    def data_start(self) -> int:
        return len(self.header)


@dataclass(frozen=True)
class StoredLinear:
    """The tensors of one Linear: ``body`` is read on every use, ``tail`` describes it and lies at the file's
    end.

    ``constants`` holds the bytes of the tail tensors, which depend on the shape alone.
    """

    body: tuple[StoredTensor, ...]
    tail: tuple[StoredTensor, ...]
    constants: Mapping[str, bytes]


def stored_linear(linear: LinearSpec, scheme: Scheme, dtype: str = "BF16", bias_dtype: str = "BF16") -> StoredLinear:
    """What ``linear`` is stored as under ``scheme``; ``dtype`` is its dense dtype, and ``bias_dtype`` its bias's."""
    found = _stored_weight(linear, scheme, dtype)
    if not linear.bias:
        return found
    bias = StoredTensor(f"{linear.module}.bias", bias_dtype, (linear.out_features,))
    return StoredLinear((*found.body, bias), found.tail, found.constants)


def _stored_weight(linear: LinearSpec, scheme: Scheme, dtype: str) -> StoredLinear:
    rows, columns, module = linear.out_features, linear.in_features, linear.module
    if scheme.is_packed:
        packed = StoredTensor(f"{module}.weight_packed", "I32", (rows, columns * scheme.bits // 32))
        scale = StoredTensor(f"{module}.weight_scale", "BF16", (rows, columns // scheme.group_size))
        shape = StoredTensor(f"{module}.weight_shape", "I64", (2,))
        dims = rows.to_bytes(8, "little") + columns.to_bytes(8, "little")
        return StoredLinear((packed, scale), (shape,), {shape.key: dims})
    if scheme.kind == "nf4":
        return _stored_nf4(linear, _NF4_DTYPES.get(dtype, "float32"))
    return StoredLinear((StoredTensor(f"{module}.weight", dtype, (rows, columns)),), (), {})


def _stored_nf4(linear: LinearSpec, dtype: str) -> StoredLinear:
    from quant.pack import quiet_bitsandbytes

    quiet_bitsandbytes()
    from bitsandbytes.functional import get_4bit_type
    from bitsandbytes.utils import pack_dict_to_tensor

    key = f"{linear.module}.weight"
    state = {
        "quant_type": "nf4",
        "blocksize": NF4_BLOCK,
        "dtype": dtype,
        "shape": [linear.out_features, linear.in_features],
    }
    described = bytes(pack_dict_to_tensor(state).numpy())
    quant_state = StoredTensor(f"{key}.quant_state.bitsandbytes__nf4", "U8", (len(described),))
    quant_map = StoredTensor(f"{key}.quant_map", "F32", (16,))
    body = (
        StoredTensor(key, "U8", (linear.weights // 2, 1)),
        StoredTensor(f"{key}.absmax", "F32", (linear.weights // NF4_BLOCK,)),
    )
    levels = bytes(get_4bit_type("nf4", device="cpu").numpy())
    return StoredLinear(body, (quant_map, quant_state), {quant_map.key: levels, quant_state.key: described})


def lay_out(name: str, body: Iterable[StoredTensor], tail: Iterable[StoredTensor]) -> FileLayout:
    """Place ``body`` in the order given, then ``tail`` by falling element size so that each stays aligned."""
    placed = [*body, *sorted(tail, key=lambda tensor: -ITEMSIZE[tensor.dtype])]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    for tensor in placed:
        offsets[tensor.key] = end
        header[tensor.key] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    start = -(-(len(text) + 8) // PAGE) * PAGE
    raw = (start - 8).to_bytes(8, "little") + text.ljust(start - 8)
    return FileLayout(name, raw, {key: start + offset for key, offset in offsets.items()}, start + end)


@dataclass(frozen=True)
class CheckpointLayout:
    """All files of one output checkpoint, and the bytes of the tensors that depend on shapes alone."""

    files: tuple[FileLayout, ...]
    constants: Mapping[str, bytes]
    tensor_bytes: int

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    @cached_property
    def weight_map(self) -> dict[str, str]:
        """Tensor key → file name, as model.safetensors.index.json has it."""
        return {key: file.name for file in self.files for key in sorted(file.offsets)}

    def place(self, key: str) -> tuple[str, int]:
        """The file and offset of tensor ``key``."""
        return self._places[key]

    @cached_property
    def _places(self) -> dict[str, tuple[str, int]]:
        return {key: (file.name, offset) for file in self.files for key, offset in file.offsets.items()}

    def index(self) -> dict[str, object]:
        """The contents of model.safetensors.index.json."""
        return {"metadata": {"total_size": self.tensor_bytes}, "weight_map": self.weight_map}


def lay_out_checkpoint(
    shape: ModelShape,
    schemes: Mapping[Role, Scheme],
    plain: Sequence[StoredTensor],
    dtypes: Mapping[str, str] | None = None,
    fused: bool = False,
    layers: Sequence[int] | None = None,
) -> CheckpointLayout:
    """Lay out a checkpoint of ``shape`` under ``schemes``.

    ``plain`` are the tensors that are no quantizable Linear (embeddings, norms, routers, biases, a vision tower
    that is not quantized);
    ``dtypes`` gives the dense dtype of a Linear's module where that is not BF16. ``fused`` stores the
    experts, which must stay dense, as the two tensors per layer that transformers has in memory. ``layers`` are
    those whose experts have files of their own: all that route, unless experts are among ``plain``.
    """
    dtypes, layers = dtypes or {}, shape.moe_layers if layers is None else layers
    stored = [
        stored_linear(linear, scheme_of(schemes, linear), dtypes.get(linear.module, "BF16"))
        for linear in (*shape.dense_linears(), *quantized_vision(shape, schemes))
    ]
    count = len(layers) + 1
    constants: dict[str, bytes] = {}
    body = [tensor for linear in stored for tensor in linear.body] + list(plain)
    tail = [tensor for linear in stored for tensor in linear.tail]
    for linear in stored:
        constants.update(linear.constants)
    # Whole pages first: each of them then starts on a page. What would shift the rest off 8 bytes goes last.
    paged = sorted((t for t in body if t.nbytes % PAGE == 0), key=_natural)
    small = sorted((t for t in body if t.nbytes % PAGE and t.nbytes % 8 == 0), key=_natural)
    odd = sorted((t for t in body if t.nbytes % 8), key=_natural)
    files = [lay_out(_file_name(1, count), paged + small, tail + odd)]
    total = sum(tensor.nbytes for tensor in [*body, *tail])
    for number, layer in enumerate(layers, start=2):
        if fused:
            body, tail = (
                fused_experts(shape, layer, dtypes.get(shape.expert_module(layer, 0, "gate_proj"), "BF16")),
                [],
            )
        else:
            experts = [
                stored_linear(
                    linear,
                    scheme_of(schemes, linear),
                    dtypes.get(linear.module, "BF16"),
                    dtypes.get(f"{linear.module}.bias", "BF16"),
                )
                for expert in range(shape.num_experts)
                for linear in shape.expert_linears(layer, expert)
            ]
            body = [tensor for linear in experts for tensor in linear.body]
            tail = [tensor for linear in experts for tensor in linear.tail]
            for linear in experts:
                constants.update(linear.constants)
        total += sum(tensor.nbytes for tensor in [*body, *tail])
        files.append(lay_out(_file_name(number, count), body, tail))
    return CheckpointLayout(tuple(files), constants, total)


def quantized_vision(shape: ModelShape, schemes: Mapping[Role, Scheme]) -> list[LinearSpec]:
    """The vision tower's Linears that ``schemes`` quantize. What it keeps in floats, source checkpoints need not have,
    and is carried through as it is."""
    return [linear for linear in shape.vision_linears() if scheme_of(schemes, linear) != BF16]


def fused_experts(shape: ModelShape, layer: int, dtype: str) -> list[StoredTensor]:
    """A layer's dense experts as ``gate_up_proj [E, 2I, H]`` and ``down_proj [E, H, I]``, in transformers'
    names.
    """
    base = shape.fused_form(layer).base
    count, hidden, inter = shape.num_experts, shape.hidden_size, shape.expert_intermediate
    gate_up = StoredTensor(f"{base}gate_up_proj", dtype, (count, 2 * inter, hidden))
    return [gate_up, StoredTensor(f"{base}down_proj", dtype, (count, hidden, inter))]


def _file_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _natural(tensor: StoredTensor) -> tuple[object, ...]:
    """Sort key that puts layer 2 before layer 10 and embeddings before the layers they feed."""
    parts = re.split(r"(\d+)", tensor.key)
    return ("vision" in tensor.key or "projector" in tensor.key, *(int(p) if p.isdigit() else p for p in parts))
