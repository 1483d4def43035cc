"""Imagined inputs: right where they can be known, the same whatever is asked for first, and of use."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quant.checkpoint.checkpoint import Checkpoint
from quant.pack import Packed, dequantize
from quant.rounding import encode
from quant.rounding import synthetic_inputs as prior
from quant.rounding.rounding import Nearest, Rounder, Search
from quant.rounding.synthetic_inputs import SyntheticInputs
from quant.scheme import Scheme
from tests.checkpoints import FAMILIES

Tiny = Callable[..., Path]
DEMO = Path(__file__).resolve().parents[3] / "recipes" / "demo"


def rounded(rounder: Rounder, weight: Tensor, scheme: Scheme, module: str) -> Tensor:
    tensors = rounder.encode(weight, scheme, module, False, module, 0).tensors
    return dequantize(Packed(scheme, tensors["weight_packed"], tensors["weight_scale"]))


def embedded(checkpoint: Checkpoint, layer: int = 0) -> Tensor:
    """What the first layer's q, k and v are given for every token of the vocabulary ``[V, H]``."""
    shape = checkpoint.shape
    table = checkpoint.read(f"{shape.prefix}model.embed_tokens.weight").float()
    norm = checkpoint.read(f"{shape.layer_prefix(layer)}input_layernorm.weight").float()
    return table * torch.rsqrt(table.square().mean(1, keepdim=True) + 1e-5) * norm


@pytest.mark.parametrize("scheme", [Scheme("int8"), Scheme("int4"), Scheme("int4", 32)])
def test_the_trained_model_s_first_layer_keeps_its_outputs_better(scheme: Scheme) -> None:
    checkpoint = Checkpoint.open(DEMO)
    x = embedded(checkpoint)
    for projection in ("q_proj", "k_proj", "v_proj"):
        module = f"model.layers.0.self_attn.{projection}"
        weight = checkpoint.read(f"{module}.weight")
        wrong = [
            float(((rounded(rounder, weight, scheme, module) - weight.float()) @ x.t()).square().sum())
            for rounder in (Search(checkpoint), Nearest())
        ]
        assert wrong[0] < 0.8 * wrong[1], projection


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", [Scheme("int8"), Scheme("int4", 32)])
def test_a_weight_cut_into_rows_is_stored_as_the_whole_and_stays_what_it_was(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, scheme: Scheme
) -> None:
    checkpoint, module = Checkpoint.open(DEMO), "model.layers.1.self_attn.o_proj"
    weight = checkpoint.read(f"{module}.weight").to(dtype)
    before, rounder = weight.clone(), Search(checkpoint)
    whole = rounder.encode(weight, scheme, module, False, module, 0)
    monkeypatch.setattr(encode, "_FEEDBACK_WEIGHTS", 1)
    cut = rounder.encode(weight, scheme, module, False, module, 0)
    turned = rounder.encode(weight.t().contiguous(), scheme, module, True, module, 0)
    assert torch.equal(weight, before)
    for other in (cut, turned):
        assert all(torch.equal(other.tensors[name], whole.tensors[name]) for name in whole.tensors)
    dense = dequantize(Packed(scheme, whole.tensors["weight_packed"], whole.tensors["weight_scale"]))
    error = float((dense - weight.float()).square().sum())
    assert whole.squared_error == pytest.approx(error, rel=1e-4)
    assert whole.squared_sum == pytest.approx(float(weight.float().square().sum()), rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_linears_have_a_curvature_in_every_layer_and_no_other_has(tiny: Tiny, family: str) -> None:
    checkpoint = Checkpoint.open(tiny(family))
    found = SyntheticInputs(checkpoint)
    for spec in checkpoint.shape.dense_linears():
        curvature = found.of(spec.module)
        none = spec.role == "lm_head" or spec.projection == "down_proj"
        assert (curvature is None) == none, spec.module
        assert curvature is None or len(curvature.order) == spec.in_features
    layer = checkpoint.shape.moe_layers[0]
    assert all(found.of(spec.module) is None for spec in checkpoint.shape.expert_linears(layer, 0))


def test_a_conversion_that_goes_on_in_the_middle_finds_the_same(tiny: Tiny) -> None:
    checkpoint = Checkpoint.open(tiny("llama4_maverick"))
    modules = [spec.module for spec in checkpoint.shape.dense_linears() if "down" not in spec.module]
    through = SyntheticInputs(checkpoint)
    expected = {module: through.of(module) for module in modules}
    for module in (modules[-2], modules[0], modules[9]):  # ahead, and back to the beginning
        late, found = SyntheticInputs(checkpoint).of(module), through.of(module)
        wanted = expected[module]
        assert late is not None and found is not None and wanted is not None
        assert torch.equal(late.first, wanted.first) and torch.equal(late.order, wanted.order)
        assert torch.equal(found.again, wanted.again)


def test_weights_read_in_pieces_walk_to_the_same_inputs(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(tiny("llama4_text"))
    module = "model.layers.3.feed_forward.shared_expert.up_proj"
    whole = SyntheticInputs(checkpoint).of(module)
    monkeypatch.setattr(prior, "_ROW_BYTES", 24 * 256)
    pieces = SyntheticInputs(checkpoint).of(module)
    assert whole is not None and pieces is not None
    torch.testing.assert_close(pieces.again, whole.again, rtol=1e-3, atol=1e-5)


def test_what_the_shared_expert_adds_reaches_the_next_layer(tiny: Tiny) -> None:
    checkpoint = Checkpoint.open(tiny("llama4_text"))
    module = "model.layers.1.self_attn.q_proj"
    found, deaf = SyntheticInputs(checkpoint), SyntheticInputs(checkpoint)
    deaf._specs = {name: spec for name, spec in deaf._specs.items() if spec.projection is None}
    one, other = found.of(module), deaf.of(module)
    assert one is not None and other is not None
    assert not torch.allclose(one.again, other.again, rtol=1e-2)


def test_a_model_without_embeddings_to_speak_of_is_rounded_to_nearest(tiny: Tiny, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = tiny("mixtral")
    folder = tmp_path / "zero"
    folder.mkdir()
    (folder / "config.json").write_text((source / "config.json").read_text())
    tensors = {key: value for file in source.glob("*.safetensors") for key, value in load_file(file).items()}
    tensors["model.embed_tokens.weight"] = torch.zeros_like(tensors["model.embed_tokens.weight"])
    save_file(tensors, folder / "model.safetensors")
    checkpoint, module = Checkpoint.open(folder), "model.layers.0.self_attn.q_proj"
    assert SyntheticInputs(checkpoint).of(module) is None
    weight = tensors[f"{module}.weight"]
    plain = rounded(Nearest(), weight, Scheme("int8"), module)
    assert torch.equal(rounded(Search(checkpoint), weight, Scheme("int8"), module), plain)
