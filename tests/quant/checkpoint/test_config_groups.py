"""The quantization_config picks the right scheme for every module, in compressed-tensors' own matching."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import is_match, match_targets
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.compressed_tensors import get_dense_scheme, get_experts_scheme

from quant.checkpoint.config_groups import check_schemes, quantization_config, stores_fused_experts
from quant.errors import RecipeError, SchemeError
from quant.model.families import Role
from quant.model.mixed_precision import MixedPrecision
from quant.model.shape import ModelShape
from quant.scheme import Scheme

Tiny = Callable[..., Path]
MIXED: dict[Role, Scheme] = {
    "experts": Scheme("int4"),
    "shared_expert": Scheme("int8"),
    "dense_mlp": Scheme("int8", 32),
    "attention": Scheme("int8", 64),
    "lm_head": Scheme("int8"),
}
SEEING: dict[Role, Scheme] = {"vision": Scheme("int8", 32)}


def shape_of(folder: Path) -> ModelShape:
    return ModelShape.from_config(json.loads((folder / "config.json").read_text()))


def group_of(config: dict[str, Any], name: str, module: torch.nn.Module) -> tuple[int, int] | None:
    """(bits, group size) that compressed-tensors gives a module; None if it leaves it alone."""
    if is_match(name, module, config["ignore"]):
        return None
    groups = QuantizationConfig.model_validate(config).config_groups
    targets = {target: group for group in groups.values() for target in group.targets}
    matched = match_targets(name, module, targets)
    if not matched:
        return None
    weights = targets[matched[0]].weights
    return weights.num_bits, weights.group_size


@pytest.mark.parametrize("family", ["llama4", "llama4_maverick", "mixtral", "qwen3_moe", "olmoe"])
@pytest.mark.parametrize("tower", [{}, SEEING], ids=["", "tower"])
@pytest.mark.parametrize("roles", [["experts"], ["attention", "lm_head"], list(MIXED), ["experts", "dense_mlp"]])
def test_each_linear_gets_its_roles_scheme_and_no_other(
    tiny: Tiny, family: str, roles: list[Role], tower: dict[Role, Scheme]
) -> None:
    shape = shape_of(tiny(family))
    schemes = {role: MIXED[role] for role in roles} | tower
    config = quantization_config(shape, schemes)
    linear = torch.nn.Linear(1, 1)
    for spec in shape.linears():
        scheme = schemes.get(spec.role)
        expected = (scheme.bits, scheme.group_size) if scheme else None
        for name in (spec.module, spec.module.removeprefix("language_model.")):
            assert group_of(config, name, linear) == expected, name
    for name, module in (("patch_embedding.linear", linear), ("model.layers.0.input_layernorm", torch.nn.LayerNorm(1))):
        assert shape.is_multimodal is False or group_of(config, f"vision_model.{name}", module) is None
    router = f"{shape.layer_prefix(shape.moe_layers[0])}{shape.family.block}.{shape.family.router}"
    assert group_of(config, router, linear) is None


def test_a_tower_alone_is_quantized_and_one_that_cannot_be_is_said(tiny: Tiny) -> None:
    shape = shape_of(tiny("llama4"))
    assert not check_schemes(shape, SEEING)
    config = quantization_config(shape, SEEING)
    for spec in shape.linears():
        assert group_of(config, spec.module, torch.nn.Linear(1, 1)) == ((8, 32) if spec.role == "vision" else None)
    with pytest.raises(RecipeError, match="vision tower in int4-g32: expected int8"):
        check_schemes(shape, {"experts": Scheme("int4"), "vision": Scheme("int4", 32)})
    with pytest.raises(SchemeError, match=r"vision_model.*use --group-size 32"):
        check_schemes(shape, {"vision": Scheme("int8")})
    blind = {"experts": Scheme("int4"), **SEEING}
    assert "no vision tower" in check_schemes(shape_of(tiny("mixtral")), blind)[0]
    with pytest.raises(RecipeError, match="nothing to quantize"):
        check_schemes(shape_of(tiny("mixtral")), SEEING)


@pytest.mark.parametrize("family", ["llama4_text", "mixtral"])
def test_one_group_keeps_linear_among_its_targets_and_it_is_the_experts(tiny: Tiny, family: str) -> None:
    groups = quantization_config(shape_of(tiny(family)), MIXED)["config_groups"].values()
    [group] = [group for group in groups if "Linear" in group["targets"]]
    assert group["weights"]["num_bits"] == 4


def test_transformers_tells_the_experts_scheme_from_the_dense_one(tiny: Tiny) -> None:
    schemes: dict[Role, Scheme] = {"experts": Scheme("int4"), "attention": Scheme("int8")}
    config = QuantizationConfig.model_validate(quantization_config(shape_of(tiny("mixtral")), schemes))
    assert get_experts_scheme(config).weights.num_bits == 4
    assert get_dense_scheme(config).weights.num_bits == 8


def test_roles_of_one_scheme_share_a_group(tiny: Tiny) -> None:
    same: dict[Role, Scheme] = dict.fromkeys(("experts", "shared_expert", "attention"), Scheme("int4"))
    config = quantization_config(shape_of(tiny("llama4_text")), same)
    assert [group["targets"] for group in config["config_groups"].values()] == [["Linear"]]


@pytest.mark.parametrize("experts", ["int8", "int4", "bf16"])
def test_the_heads_name_is_a_target_because_vllms_is_no_linear(tiny: Tiny, experts: str) -> None:
    shape = shape_of(tiny("llama4_text"))
    schemes: dict[Role, Scheme] = {"experts": Scheme.parse(experts), "lm_head": Scheme("int8")}
    if experts == "bf16":
        del schemes["experts"]
    groups = quantization_config(shape, schemes)["config_groups"].values()
    assert [group["weights"]["num_bits"] for group in groups if r"re:.*lm_head$" in group["targets"]] == [8]


@pytest.mark.parametrize(("projection", "said"), [("down_proj", True), ("all", False)])
def test_experts_stored_unlike_the_rest_of_their_layer_are_a_note(tiny: Tiny, projection: str, said: bool) -> None:
    """vLLM reads the first expert's scheme, and computes nonsense without a word."""
    shape = shape_of(tiny("llama4_text"))
    experts = [linear for linear in shape.linears() if linear.role == "experts"]
    wide = {linear.module for linear in experts if projection in ("all", linear.projection) and linear.layer == 1}
    mixture = MixedPrecision.of((one, Scheme("int8" if one.module in wide else "int4")) for one in experts)
    notes = check_schemes(shape, mixture)
    assert any("layer 1 has experts in int4-g128 and int8-g128: vLLM" in note for note in notes) == said


def test_fused_module_names_match_as_their_parts_do(tiny: Tiny) -> None:
    config = quantization_config(shape_of(tiny("llama4_maverick")), MIXED)
    linear = torch.nn.Linear(1, 1)
    assert group_of(config, "language_model.model.layers.0.self_attn.qkv_proj", linear) == (8, 64)
    assert group_of(config, "language_model.model.layers.0.feed_forward.gate_up_proj", linear) == (8, 32)
    assert group_of(config, "language_model.model.layers.1.feed_forward.shared_expert.gate_up_proj", linear) == (8, 128)


def test_nf4_skips_what_stays_dense(tiny: Tiny) -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    for family in ("llama4_maverick", "qwen3_moe"):
        shape = shape_of(tiny(family))
        config = quantization_config(shape, {"experts": Scheme("nf4"), "attention": Scheme("nf4")})
        assert config["quant_method"] == "bitsandbytes" and config["bnb_4bit_quant_type"] == "nf4"
        for spec in shape.linears():
            wanted = spec.role in ("experts", "attention")
            assert should_convert_module(spec.module, config["llm_int8_skip_modules"]) == wanted, spec.module


def test_dense_experts_are_fused_only_where_transformers_fuses_them(tiny: Tiny) -> None:
    attention: dict[Role, Scheme] = {"attention": Scheme("int8")}
    assert stores_fused_experts(shape_of(tiny("mixtral")), attention)
    assert not stores_fused_experts(shape_of(tiny("llama4_text")), attention)
    assert not stores_fused_experts(shape_of(tiny("mixtral")), {"experts": Scheme("int4")})
    assert not stores_fused_experts(shape_of(tiny("mixtral")), {"attention": Scheme("nf4")})


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_transformers_loads_every_module_the_config_was_written_for(tiny: Tiny, family: str) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny(family)))
    names = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert names == {spec.module for spec in shape_of(tiny(family)).dense_linears()}
