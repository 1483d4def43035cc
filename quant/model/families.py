"""Per model family: the names of its tensors, the role of each, and how fused experts are sliced.

A family is data: the words its checkpoints use. ``ModelShape`` (``quant/model/shape.py``) joins a family with
the numbers of one config.json. Pure Python: planning needs neither torch nor a checkpoint.

Legend: E experts, H hidden size, I expert intermediate size.

Fused experts come in two forms. Llama 4 stores them *transposed*: ``gate_up_proj [E, H, 2I]`` (gate first,
then up, halves not interleaved) and ``down_proj [E, I, H]``. All others store ``gate_up_proj [E, 2I, H]`` and
``down_proj [E, H, I]``. The quantized checkpoint always has one 2-D Linear ``[out, in]`` per expert.
"""

import re
from dataclasses import dataclass
from typing import Literal, get_args

from quant.errors import UnknownFamilyError
from quant.input_file import short

Fused = Literal["", "gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"]
Role = Literal[
    "experts", "shared_expert", "dense_mlp", "attention", "lm_head", "embeddings", "router", "norm", "vision"
]
ROLES: tuple[Role, ...] = get_args(Role)
TEXT_ROLES: tuple[Role, ...] = ("experts", "shared_expert", "dense_mlp", "attention", "lm_head")
QUANTIZABLE: tuple[Role, ...] = (*TEXT_ROLES, "vision")
# As people call them, in refusals and tables; recipes and options have the roles themselves.
ROLE_NAMES: dict[str, str] = {
    "experts": "routed experts",
    "shared_expert": "shared experts",
    "dense_mlp": "dense MLPs",
    "attention": "attention",
    "lm_head": "LM head",
    "embeddings": "embeddings",
    "router": "routers",
    "norm": "norms",
    "vision": "vision tower",
}

Projection = Literal["gate_proj", "up_proj", "down_proj"]
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)


@dataclass(frozen=True)
class Family:
    """The names one model family gives its parts.

    ``block`` is the MoE block's name in a checkpoint, ``runtime_block`` its name in the transformers module;
    ``projections`` are the checkpoint's names of gate_proj, up_proj and down_proj of one expert.
    ``scales_input`` is true where the router's score multiplies the expert's input (Llama 4), false where it
    multiplies the output.
    """

    name: str
    model_types: tuple[str, ...]
    block: str
    runtime_block: str
    router: str
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared_expert: str | None = None
    fused_transposed: bool = False
    scales_input: bool = False

    def projection(self, projection: Projection) -> str:
        """The checkpoint's name of an expert's ``projection``."""
        return self.projections[PROJECTIONS.index(projection)]


LLAMA4 = Family(
    name="llama4",
    model_types=("llama4", "llama4_text"),
    block="feed_forward",
    runtime_block="feed_forward",
    router="router",
    shared_expert="shared_expert",
    fused_transposed=True,
    scales_input=True,
)
MIXTRAL = Family(
    name="mixtral",
    model_types=("mixtral",),
    block="block_sparse_moe",
    runtime_block="mlp",
    router="gate",
    projections=("w1", "w3", "w2"),
)
QWEN3_MOE = Family(name="qwen3_moe", model_types=("qwen3_moe",), block="mlp", runtime_block="mlp", router="gate")
OLMOE = Family(name="olmoe", model_types=("olmoe",), block="mlp", runtime_block="mlp", router="gate")
FAMILIES: tuple[Family, ...] = (LLAMA4, MIXTRAL, QWEN3_MOE, OLMOE)

# Families without a table whose layers the CPU's kernels compute whole, all read off transformers' modules.
CPU_LAYERS: tuple[str, ...] = (
    "gpt_oss",
    "glm4_moe",
    "dots1",
    "qwen2_moe",
    "ernie4_5_moe",
    "minimax_m2",
    "hunyuan_v1_moe",
    "deepseek_v2",
    "deepseek_v3",
    "llama",
    "qwen3",
    "mistral",
)


def is_tabled(model_type: object) -> bool:
    """Whether the names and numbers of ``model_type`` are in the tables here."""
    return any(model_type in family.model_types for family in FAMILIES)


def family_of(model_type: object) -> Family:
    """The family of a config's ``model_type``. Raises UnknownFamilyError naming the known ones."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(kind for family in FAMILIES for kind in family.model_types)
    raise UnknownFamilyError(
        f"model_type {short(model_type)} is not a family Coldstream knows: expected one of {known}"
    )


@dataclass(frozen=True)
class TensorName:
    """What a checkpoint key says: its role and, where it has one, its layer, expert and projection.

    ``fused`` is set for a tensor that holds all experts of a layer. ``suffix`` is the last part of the key
    (``weight``, ``weight_packed``, ``weight.absmax``, ``bias`` …), empty for fused experts.
    """

    role: Role
    module: str
    suffix: str
    layer: int | None = None
    expert: int | None = None
    projection: Projection | None = None
    fused: Fused = ""


_LAYER = re.compile(r"^(?P<prefix>.*?)layers\.(?P<layer>\d+)\.(?P<rest>.+)$")
_EXPERT = re.compile(r"^experts\.(?P<expert>\d+)\.(?P<projection>\w+)\.(?P<suffix>.+)$")
_SUFFIX = re.compile(
    r"\.(weight_packed|weight_scale|weight_shape|weight_zero_point|weight_g_idx|weight(?:\..+)?|bias)$"
)
_VISION = ("vision_model.", "multi_modal_projector.", "model.vision_model.", "model.multi_modal_projector.")


def parse_name(family: Family, key: str) -> TensorName | None:
    """What checkpoint key ``key`` is in ``family``; None for a key the family does not explain."""
    match = _SUFFIX.search(key)
    module, suffix = (key[: match.start()], match[1]) if match else (key, "")
    if key.startswith(_VISION):
        return TensorName("vision", module, suffix)
    layered = _LAYER.match(key)
    if layered is None:
        return _parse_outer(module, suffix)
    layer, rest = int(layered["layer"]), layered["rest"]
    block, _, inner = rest.partition(".")
    inner_module = inner[: -len(suffix) - 1] if suffix else inner
    if block in (family.block, family.runtime_block):
        return _parse_block(family, module, suffix, layer, inner, inner_module)
    if block == "self_attn":
        role: Role = "norm" if "norm" in inner else "attention"
        return TensorName(role, module, suffix, layer)
    if block.endswith("layernorm") or block.endswith("norm"):
        return TensorName("norm", module, suffix, layer)
    return None


def _parse_outer(module: str, suffix: str) -> TensorName | None:
    last = module.rpartition(".")[2]
    if last == "lm_head":
        return TensorName("lm_head", module, suffix)
    if last == "embed_tokens":
        return TensorName("embeddings", module, suffix)
    if last == "norm":
        return TensorName("norm", module, suffix)
    return None


def _parse_block(
    family: Family, module: str, suffix: str, layer: int, inner: str, inner_module: str
) -> TensorName | None:
    if inner_module == family.router:
        return TensorName("router", module, suffix, layer)
    if inner in ("experts.gate_up_proj", "experts.down_proj"):
        fused: Literal["gate_up_proj", "down_proj"] = "gate_up_proj" if inner.endswith("gate_up_proj") else "down_proj"
        return TensorName("experts", module, "", layer, fused=fused)
    expert = _EXPERT.match(inner)
    if expert is not None:
        if expert["projection"] not in family.projections:
            return None
        projection = PROJECTIONS[family.projections.index(expert["projection"])]
        return TensorName("experts", module, suffix, layer, int(expert["expert"]), projection)
    if family.shared_expert and inner.startswith(family.shared_expert + "."):
        last = inner_module.rpartition(".")[2]
        return TensorName("shared_expert", module, suffix, layer) if last in PROJECTIONS else None
    if inner_module in PROJECTIONS:
        return TensorName("dense_mlp", module, suffix, layer)
    return None
