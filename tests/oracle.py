"""The oracle: stock transformers on the dequantized weights of a quantized checkpoint."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Llama4ForConditionalGeneration, PreTrainedModel

from quant.architecture.general_shape import GeneralShape
from quant.architecture.meta_model import model_class, model_config
from quant.checkpoint.checkpoint import Checkpoint
from quant.checkpoint.inventory import find_weight
from quant.model.tensors import LinearSpec
from quant.pack import Packed, dequantize, dequantize_nf4


def dense_weight(checkpoint: Checkpoint, spec: LinearSpec) -> torch.Tensor:
    """``spec``'s weight as f32 ``[N, K]``, dequantized by the reference."""
    scheme, entries = find_weight(checkpoint, spec)
    tensors = {suffix: checkpoint.read(entry.key) for suffix, entry in entries.items()}
    if scheme.is_packed:
        return dequantize(Packed(scheme, tensors["weight_packed"], tensors["weight_scale"]))
    return (dequantize_nf4(tensors) if scheme.kind == "nf4" else tensors["weight"]).float()


def stock(source: Path, quantized: Path) -> PreTrainedModel:
    """The stock model of ``source`` in f32, its Linears holding what ``quantized`` dequantizes to."""
    if not Checkpoint.open(source).shape.is_native:
        return _general(source, quantized)
    multimodal = Checkpoint.open(source).config["model_type"] == "llama4"
    kind = Llama4ForConditionalGeneration if multimodal else AutoModelForCausalLM
    model = kind.from_pretrained(source, dtype=torch.float32).eval()
    checkpoint = Checkpoint.open(quantized)
    shape, parameters = checkpoint.shape, dict(model.named_parameters())

    def parameter(module: str) -> torch.nn.Parameter:
        name = module.replace(f".{shape.family.block}.", f".{shape.family.runtime_block}.")
        return next(value for key, value in parameters.items() if key == name or key.endswith("." + name))

    with torch.no_grad():
        for spec in (*shape.dense_linears(), *(shape.vision_linears() if multimodal else ())):
            parameter(f"{spec.module}.weight").copy_(dense_weight(checkpoint, spec))
        for layer in shape.moe_layers:
            base = f"{shape.layer_prefix(layer)}{shape.family.block}.experts."
            gate_up, down = parameter(f"{base}gate_up_proj"), parameter(f"{base}down_proj")
            for expert in range(shape.num_experts):
                gate, up, out = _expert(checkpoint, layer, expert)
                joined = torch.cat((gate, up))
                gate_up[expert].copy_(joined.t() if shape.family.fused_transposed else joined)
                down[expert].copy_(out.t() if shape.family.fused_transposed else out)
    return model


def _general(source: Path, quantized: Path) -> PreTrainedModel:
    """As ``stock``, for a family that no table names."""
    checkpoint = Checkpoint.open(quantized)
    shape = checkpoint.shape
    assert isinstance(shape, GeneralShape)
    kind = model_class(model_config(checkpoint.config))
    model: PreTrainedModel = kind.from_pretrained(source, dtype=torch.float32).eval()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for spec in shape.dense_linears():
            parameters[f"{shape.runtime_name(spec.module)}.weight"].copy_(dense_weight(checkpoint, spec))
        for layer in shape.moe_layers:
            form = shape.fused_form(layer)
            gate_up, down = parameters[f"{form.base}gate_up_proj"], parameters[f"{form.base}down_proj"]
            for expert in range(shape.num_experts):
                gate, up, out = _expert(checkpoint, layer, expert)
                joined = torch.stack((gate, up), 1).flatten(0, 1) if form.interleaved else torch.cat((gate, up))
                gate_up[expert].copy_(joined.t() if form.transposed else joined)
                down[expert].copy_(out.t() if form.transposed else out)
    return model


def _expert(checkpoint: Checkpoint, layer: int, expert: int) -> list[torch.Tensor]:
    if checkpoint.fused_experts(layer) is not None:
        return [view.dense().float() for view in checkpoint.expert(layer, expert).values()]
    return [dense_weight(checkpoint, spec) for spec in checkpoint.shape.expert_linears(layer, expert)]
