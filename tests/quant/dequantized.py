"""The dequantized twin of a quantized checkpoint: the source with every quantized weight replaced by its
values.

Written in the source's own layout, so that stock transformers loads it without any quantizer: the reference
that a quantized checkpoint is held against.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant.checkpoint.checkpoint import Checkpoint
from quant.pack import Packed, dequantize
from quant.scheme import PACKED, Scheme


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def packed_weights(folder: Path) -> dict[str, Packed]:
    """Every packed weight of a quantized checkpoint by module, its scheme read from the tensors' shapes."""
    tensors = tensors_of(folder)
    found: dict[str, Packed] = {}
    for key, packed in tensors.items():
        if key.endswith(".weight_packed"):
            module = key.removesuffix(".weight_packed")
            columns = int(tensors[f"{module}.weight_shape"][1])
            scale = tensors[f"{module}.weight_scale"]
            kind = PACKED[packed.shape[1] * 32 // columns]
            found[module] = Packed(Scheme(kind, columns // scale.shape[1]), packed, scale)
    return found


def dequantized_twin(source: Path, quantized: Path, out: Path) -> Path:
    """Save ``source`` in f32 with the weights that ``quantized`` holds packed dequantized.

    Where transformers fuses experts while loading it keeps them in bf16, whatever dtype is asked for: so
    here.
    """
    checkpoint = Checkpoint.open(source)
    shape = checkpoint.shape
    rounds = not shape.family.fused_transposed
    weights = {module: dequantize(packed) for module, packed in packed_weights(quantized).items()}
    tensors = {key: checkpoint.read(key).float() for key in checkpoint.entries}
    for layer in shape.moe_layers:
        fused = checkpoint.fused_experts(layer)
        for expert in range(shape.num_experts):
            for linear in shape.expert_linears(layer, expert):
                if linear.module not in weights:
                    continue
                dense = weights.pop(linear.module)
                dense = dense.bfloat16().float() if rounds else dense
                if fused is None:
                    tensors[f"{linear.module}.weight"] = dense
                    continue
                assert linear.projection is not None
                target = tensors[fused.entries[fused.name(linear.projection)].key][expert]
                target = target.t() if shape.family.fused_transposed else target
                half = target.shape[0] // 2
                rows = {"gate_proj": slice(0, half), "up_proj": slice(half, None), "down_proj": slice(None)}
                assert linear.projection is not None
                target[rows[linear.projection]] = dense
    for module, dense in weights.items():
        assert tensors[f"{module}.weight"].shape == dense.shape
        tensors[f"{module}.weight"] = dense
    out.mkdir(parents=True)
    for file in source.glob("*.json"):
        if "index" not in file.name:
            shutil.copyfile(file, out / file.name)
    config = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config))
    save_file({key: value.contiguous() for key, value in tensors.items()}, out / "model.safetensors", {"format": "pt"})
    return out


def random_tokens(count: int = 48) -> Tensor:
    """Token ids below 240: clear of the ids that stand for images."""
    return torch.randint(240, (1, count), generator=torch.Generator().manual_seed(7))
