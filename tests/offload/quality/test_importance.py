"""Importance matrix: what is measured are the model's own inputs, and rounding by it serves them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from offload.quality.importance import measure_importance
from offload.quality.windows import Windows
from quant.checkpoint.checkpoint import Checkpoint
from quant.errors import InputError
from quant.pack import dequantize, quantize_absmax
from quant.rounding.imatrix import ChannelMoments, Imatrix, Weighted, round_weighted
from quant.rounding.rounding import Nearest
from quant.rounding.search import search
from quant.scheme import Scheme

Tiny = Callable[..., Path]
WINDOWS = Windows(torch.randint(0, 240, (4, 64), generator=torch.Generator().manual_seed(2)))


@pytest.fixture(scope="module")
def measured(tiny: Tiny) -> Imatrix:
    return measure_importance(Checkpoint.open(tiny("llama4_maverick")), WINDOWS)


def test_every_linear_is_measured_on_the_inputs_it_has_in_the_stock_model(tiny: Tiny, measured: Imatrix) -> None:
    source = tiny("llama4_maverick")
    assert set(measured.moments) == {spec.module for spec in Checkpoint.open(source).shape.linears()}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    seen: dict[str, torch.Tensor] = {}
    watched = ("model.layers.2.self_attn.o_proj", "model.layers.1.feed_forward.shared_expert.down_proj", "lm_head")
    for name in watched:
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, inputs, name=name: seen.update({name: inputs[0].flatten(0, -2)})
        )
    with torch.inference_mode():
        model(input_ids=WINDOWS.ids)
    for name in watched:
        x, moments = seen[name], measured.moments[name]
        torch.testing.assert_close(moments.square, x.square().mean(0), rtol=1e-4, atol=1e-7)
        kept = moments.directions.square().sum() / moments.square.sum()
        assert 0.3 < kept < 1.001  # 32 of 128 directions hold more than their share


def test_rounding_by_it_costs_outputs_less_than_a_search_that_knows_nothing(measured: Imatrix) -> None:
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(4))
    for module in ("model.layers.1.feed_forward.experts.3.gate_proj", "model.layers.2.self_attn.o_proj"):
        moments, scheme = measured.moments[module], Scheme("int4")
        ours = dequantize(round_weighted(weight, scheme, moments)) - weight
        theirs = dequantize(search(weight, scheme)) - weight
        assert moments.cost(ours).sum() < 0.85 * moments.cost(theirs).sum()


def test_cost_is_the_mean_square_of_outputs_where_few_directions_are_all_there_is() -> None:
    generator = torch.Generator().manual_seed(3)
    basis, error = torch.randn(4, 64, generator=generator), torch.randn(8, 64, generator=generator)
    x = torch.randn(5000, 4, generator=generator) @ basis
    values, vectors = torch.linalg.eigh(x.t() @ x / len(x))
    moments = ChannelMoments(x.square().mean(0), (vectors[:, -4:] * values[-4:].sqrt()).t())
    expected = (x @ error.t()).square().mean(0)
    assert float(moments.cost(error).sum() / expected.sum()) == pytest.approx(1.05, abs=0.03)  # the least rest


def test_saved_and_read_back_it_is_the_same_and_only_its_own_models(tmp_path: Path, measured: Imatrix) -> None:
    file = tmp_path / "im.safetensors"
    measured.save(file)
    again = Imatrix.load(file, measured.model)
    assert again.text == measured.text and set(again.moments) == set(measured.moments)
    for module, moments in measured.moments.items():
        assert torch.equal(again.moments[module].square, moments.square)
    with pytest.raises(InputError, match="of another model"):
        Imatrix.load(file, "0" * 16)
    (tmp_path / "no.safetensors").write_text("no")
    with pytest.raises(InputError, match="cannot be read as an importance matrix"):
        Imatrix.load(tmp_path / "no.safetensors", measured.model)


def test_blocks_of_rows_and_transposed_sources_give_the_same(measured: Imatrix) -> None:
    module = "model.layers.0.self_attn.q_proj"
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(6)).bfloat16()
    rounder = Weighted(measured, Nearest())
    whole = rounder.encode(weight, Scheme("int4"), "w", False, module, 0)
    turned = rounder.encode(weight.t().contiguous(), Scheme("int4"), "w", True, module, 0)
    below = rounder.encode(weight[32:], Scheme("int4"), "w", False, module, 32)
    assert torch.equal(whole.tensors["weight_packed"], turned.tensors["weight_packed"])
    assert torch.equal(whole.tensors["weight_packed"][32:], below.tensors["weight_packed"])
    int8 = rounder.encode(weight, Scheme("int8"), "w", False, module, 0)
    assert torch.equal(int8.tensors["weight_packed"], quantize_absmax(weight, Scheme("int8")).packed)
