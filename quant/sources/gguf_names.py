"""Which weight of a transformers model each tensor of a GGUF file is.

llama.cpp names them alike in all architectures: ``blk.3.attn_q.weight``, ``blk.3.ffn_gate_exps.weight`` with the
experts of a layer in one tensor, older files ``blk.3.ffn_gate.5.weight`` with one each. The model's family gives the
names that they have in a checkpoint.
"""

import re
from collections.abc import Iterator, Mapping

from quant.checkpoint.checkpoint import Checkpoint
from quant.checkpoint.weight_files import TensorEntry
from quant.errors import CheckpointError
from quant.input_file import short
from quant.model.families import PROJECTIONS, Projection
from quant.model.shape import ModelShape
from quant.sources.gguf import PLAIN, QUANTIZED, GgufWeight
from quant.sources.gguf_file import GgufFile, GgufTensor
from quant.sources.gguf_general import expanded_latents, general_names
from quant.sources.weight import SourceWeight

_LAYER = re.compile(r"^blk\.(?P<layer>\d+)\.(?P<rest>.+)$")
_EXPERTS = re.compile(r"^ffn_(?P<name>gate|up|down)_exps\.weight$")
_EXPERT = re.compile(r"^ffn_(?P<name>gate|up|down)\.(?P<expert>\d+)\.weight$")
_MLP = re.compile(r"^ffn_(?P<name>gate|up|down)(?P<shared>_shexp)?\.weight$")
_ATTENTION = re.compile(r"^attn_(?P<name>q|k|v|output)\.(?P<suffix>weight|bias)$")
_PROJECTION: Mapping[str, Projection] = dict(zip(("gate", "up", "down"), PROJECTIONS, strict=True))
_OUTER = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_NORMS = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
}
ROPE = "rope_freqs.weight"


def of_ignored_layers(file: GgufFile, shape: ModelShape) -> set[str]:
    """The tensors of layers that transformers leaves out of the model: those that draft tokens."""
    found = ((name, _LAYER.match(name)) for name in file.tensors)
    layers = ((name, int(match["layer"])) for name, match in found if match)
    return {name for name, at in layers if at >= shape.num_layers and shape.is_ignored(shape.layer_prefix(at))}


def stored_entries(file: GgufFile) -> dict[str, TensorEntry]:
    """The tensors as bytes ``[..., row bytes]``, by GGUF's names. Raises CheckpointError for a type that no weight is
    read from."""
    entries: dict[str, TensorEntry] = {}
    for name, tensor in file.tensors.items():
        if tensor.kind not in PLAIN and tensor.kind not in QUANTIZED:
            known = ", ".join(kind.name for kind in (*PLAIN, *QUANTIZED))
            raise CheckpointError(f"{tensor.file}: tensor {short(name)} is {tensor.kind.name}: expected one of {known}")
        shape = (*(tensor.shape[:-1] or (1,)), tensor.row_bytes)
        entries[name] = TensorEntry(name, tensor.file, "U8", shape, tensor.offset, tensor.nbytes)
    return entries


def gguf_weights(raw: Checkpoint, file: GgufFile, shape: ModelShape) -> Iterator[SourceWeight]:
    """Every weight of the model by the name that its family has for it. What has no such name is left out. Raises
    CheckpointError for an architecture that is not the model's, or whose weights are not known to be in their order."""
    if not shape.is_native:
        for name, key, expert in general_names(file, shape):
            if name in file.tensors:
                yield _weight(raw, file.tensors[name], key, expert, shape.num_experts, 0)
        yield from expanded_latents(raw, file, shape)
        return
    for tensor in file.tensors.values():
        for key, expert in _names(tensor.name, shape):
            yield _weight(raw, tensor, key, expert, shape.num_experts, _heads(file.architecture, tensor.name, shape))


def _weight(raw: Checkpoint, tensor: GgufTensor, key: str, expert: int | None, experts: int, heads: int) -> GgufWeight:
    dims, first = tensor.shape, 0
    if expert is not None:
        if len(dims) != (2 if key.endswith(".bias") else 3) or dims[0] != experts:
            raise CheckpointError(f"{tensor.file}: tensor {tensor.name} is {list(dims)}: expected {experts} experts")
        dims, first = dims[1:], expert * (dims[1] if len(dims) == 3 else 1)
    parts = (raw.entries[tensor.name],)
    if heads and (len(dims) != 2 or dims[0] % (2 * heads)):
        raise CheckpointError(f"{tensor.file}: tensor {tensor.name} is {list(dims)}: expected rows of {heads} heads")
    return GgufWeight(raw, key, dims, f"GGUF {tensor.kind.name}", parts, tensor.kind, first, heads)


def _heads(architecture: str, name: str, shape: ModelShape) -> int:
    """How many heads the rows of tensor ``name`` are of, if they are in llama.cpp's order; else 0."""
    if architecture != "llama":
        return 0
    last = name.rpartition("blk.")[2].partition(".")[2]
    return {"attn_q.weight": shape.num_heads, "attn_k.weight": shape.num_kv_heads}.get(last, 0)


def _names(name: str, shape: ModelShape) -> Iterator[tuple[str, int | None]]:
    """The keys that the checkpoint has for a GGUF tensor, and which of its experts each is of."""
    if name in _OUTER:
        yield shape.prefix + _OUTER[name], None
    if name == "output.weight":
        yield f"{shape.prefix}lm_head.weight", None
    layered = _LAYER.match(name)
    if layered is None:
        return
    layer, rest, family = int(layered["layer"]), layered["rest"], shape.family
    prefix = shape.layer_prefix(layer)
    if rest in _NORMS:
        yield prefix + _NORMS[rest], None
    elif rest == "ffn_gate_inp.weight":
        yield f"{prefix}{family.block}.{family.router}.weight", None
    elif found := _ATTENTION.match(rest):
        yield f"{prefix}self_attn.{'o' if found['name'] == 'output' else found['name']}_proj.{found['suffix']}", None
    elif found := _EXPERTS.match(rest):
        for expert in range(shape.num_experts):
            yield f"{shape.expert_module(layer, expert, _PROJECTION[found['name']])}.weight", expert
    elif found := _EXPERT.match(rest):
        yield f"{shape.expert_module(layer, int(found['expert']), _PROJECTION[found['name']])}.weight", None
    elif found := _MLP.match(rest):
        shared = f"{family.block}.{family.shared_expert}" if found["shared"] else family.runtime_block
        yield f"{prefix}{shared}.{_PROJECTION[found['name']]}.weight", None
