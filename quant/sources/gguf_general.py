"""Which weights the tensors of a GGUF file are in a model of a family without a table of ours.

The ``gguf`` package says how llama.cpp's converter calls each parameter of transformers' models, so the model's own
parameters are looked up in its map. Only of architectures whose weights the converter leaves in their order: in others
(``llama``) rows of q_proj and k_proj are turned, which a name does not say.

Legend: h heads, n channels of a head's key that RoPE leaves alone, v of its value, L of a latent.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from gguf import get_tensor_name_map
from gguf.constants import MODEL_ARCH, GGMLQuantizationType
from torch import Tensor

from quant.errors import CheckpointError
from quant.input_file import short
from quant.model.families import PROJECTIONS
from quant.model.shape import ModelShape
from quant.sources.gguf import dequantized
from quant.sources.gguf_file import GgufFile
from quant.sources.weight import SourceWeight

# By GGUF's architecture: the package's, and the families of transformers that are converted to it.
ARCHITECTURES: dict[str, tuple[MODEL_ARCH, tuple[str, ...]]] = {
    "deepseek2": (MODEL_ARCH.DEEPSEEK2, ("deepseek_v2", "deepseek_v3")),
    "gpt-oss": (MODEL_ARCH.GPT_OSS, ("gpt_oss",)),
    "glm4moe": (MODEL_ARCH.GLM4_MOE, ("glm4_moe",)),
    "dots1": (MODEL_ARCH.DOTS1, ("dots1",)),
}
KEYS, VALUES, BOTH = "attn_k_b.weight", "attn_v_b.weight", "attn_kv_b.weight"


@dataclass(frozen=True)
class ExpandedLatent(SourceWeight):
    """kv_b_proj ``[h · (n + v), L]``, which newer files hold in two: ``parts`` are what makes keys, turned round,
    ``[h, L, n]``, and what makes values, ``[h, v, L]``, of types ``kinds``."""

    kinds: tuple[GGMLQuantizationType, GGMLQuantizationType]
    sizes: tuple[int, int]  # n and v

    def rows(self, start: int, stop: int) -> Tensor:
        """See ``SourceWeight``."""
        (of_keys, of_values), (keys, values), latent = self.parts, self.sizes, self.shape[1]
        heads = range(start // (keys + values), -(-stop // (keys + values)))
        found: list[Tensor] = []
        for head in heads:
            turned = self.stored_rows(of_keys, head * latent, (head + 1) * latent)
            plain = self.stored_rows(of_values, head * values, (head + 1) * values)
            found += [dequantized(turned, self.kinds[0]).T, dequantized(plain, self.kinds[1])]
        first = heads.start * (keys + values)
        return torch.cat(found)[start - first : stop - first].contiguous()


def general_names(file: GgufFile, shape: ModelShape) -> Iterator[tuple[str, str, int | None]]:
    """(GGUF's name, the checkpoint's key, which of the tensor's experts) of every parameter of the model; where one
    tensor of the file has no such name it is left out. Raises CheckpointError for an architecture that is not known to
    keep weights in their order, or is not the model's."""
    known = ARCHITECTURES.get(file.architecture)
    if known is None or shape.model_type not in known[1]:
        of = ", ".join(name for name, (_, families) in ARCHITECTURES.items() if shape.model_type in families)
        raise CheckpointError(
            f"{file.path} is of architecture {short(file.architecture)}: expected {of or 'no GGUF file'} for a "
            f"{shape.model_type} model"
        )
    names = get_tensor_name_map(known[0], shape.num_layers)

    def name_of(parameter: str) -> str | None:
        base = parameter.replace("e_score_correction_bias", "e_score_correction.bias")
        base = base if base.endswith((".weight", ".bias")) else f"{base}.weight"
        return names.get_name(base, try_suffixes=(".weight", ".bias"))

    keys = [f"{linear.module}.weight" for linear in shape.dense_linears()]
    for key in (*keys, *(tensor.key for tensor in shape.plain_tensors())):
        found = name_of(key)
        if found is not None:
            yield found, key, None
    for layer in shape.moe_layers:
        suffixes = ("weight", "bias") if shape.expert_bias else ("weight",)
        for projection in PROJECTIONS:
            stem = f"{shape.layer_prefix(layer)}mlp.experts.{projection}"
            for suffix in suffixes:
                found = name_of(f"{stem}.{suffix}")
                for expert in range(shape.num_experts if found is not None else 0):
                    yield str(found), f"{shape.expert_module(layer, expert, projection)}.{suffix}", expert


def expanded_latents(raw: Any, file: GgufFile, shape: ModelShape) -> Iterator[ExpandedLatent]:
    """Each layer's kv_b_proj, where the file holds it in two. Raises CheckpointError if the two do not fit."""
    for linear in shape.dense_linears():
        if linear.layer is None or not linear.module.endswith(".kv_b_proj"):
            continue
        keys, values = (file.tensors.get(f"blk.{linear.layer}.{name}") for name in (KEYS, VALUES))
        if keys is None or values is None:
            continue
        heads = shape.num_heads
        expected = linear.out_features // heads
        if (
            len(keys.shape) != 3
            or len(values.shape) != 3
            or keys.shape[:2] != (heads, linear.in_features)
            or values.shape != (heads, expected - keys.shape[2], linear.in_features)
        ):
            raise CheckpointError(
                f"{file.path}: {keys.name} is {list(keys.shape)}, {values.name} {list(values.shape)}: expected "
                f"{expected} rows in both for each of {heads} heads"
            )
        kinds = (keys.kind, values.kind)
        form = f"GGUF {' and '.join(dict.fromkeys(kind.name for kind in kinds))}"
        yield ExpandedLatent(
            raw,
            f"{linear.module}.weight",
            (linear.out_features, linear.in_features),
            form,
            (raw.entries[keys.name], raw.entries[values.name]),
            kinds,
            (keys.shape[2], values.shape[1]),
        )
