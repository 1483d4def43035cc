"""A config.json alone says what a quantized checkpoint's roles are stored as."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from quant.checkpoint.config_groups import quantization_config
from quant.checkpoint.stored import stored_schemes
from quant.convert.convert import convert
from quant.errors import CheckpointError
from quant.model.families import Role, is_tabled
from quant.model.known_shapes import load_shape, shape_names
from quant.model.recipe import load_recipe, recipe_names
from quant.model.shape import ModelShape
from quant.scheme import BF16, Scheme

NF4 = Scheme("nf4")
BY_HAND: list[dict[Role, Scheme]] = [
    {"experts": NF4},
    {"experts": NF4, "attention": NF4, "shared_expert": NF4, "dense_mlp": NF4},
    {"attention": Scheme("int4", 32)},
    {"lm_head": Scheme("int8"), "experts": Scheme("int8", 64)},
]


TABLED_SHAPES = [name for name in shape_names() if is_tabled(load_shape(name)["model_type"])]


@pytest.mark.parametrize("shape", TABLED_SHAPES)
@pytest.mark.parametrize("schemes", [*(load_recipe(name).schemes for name in recipe_names()), *BY_HAND], ids=str)
def test_what_a_quantizer_writes_is_read_back(shape: str, schemes: dict[Role, Scheme]) -> None:
    config = load_shape(shape)
    model = ModelShape.from_config(config)
    written = {**config, "quantization_config": quantization_config(model, schemes)}
    found = stored_schemes(written, model)
    assert found is not None
    present = {linear.role for linear in model.dense_linears()} | {"experts"}
    assert found == {role: schemes.get(role, BF16) for role in present}


@pytest.mark.parametrize("family", ["llama4_text", "llama4", "mixtral", "qwen3_moe", "olmoe"])
def test_a_converted_checkpoint_is_read_back(family: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    schemes: dict[Role, Scheme] = {"experts": Scheme("int4"), "attention": Scheme("int8", 64)}
    convert(tiny(family), tmp_path / "model", schemes)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    found = stored_schemes(config, ModelShape.from_config(config)) or {}
    assert {role: scheme for role, scheme in found.items() if scheme != BF16} == schemes


def test_a_plain_config_says_nothing() -> None:
    config = load_shape("scout")
    assert stored_schemes(config, ModelShape.from_config(config)) is None


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantized by 'gptq'"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "not to nf4"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}},
            },
            "symmetric int2, int3, int4 or int8",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "g": {
                        "targets": ["Linear"],
                        "weights": {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 100},
                    }
                },
            },
            "group size 100",
        ),
    ],
)
def test_a_foreign_quantization_is_refused(quantization: dict[str, object], message: str) -> None:
    config = {**load_shape("scout"), "quantization_config": quantization}
    with pytest.raises(CheckpointError, match=message):
        stored_schemes(config, ModelShape.from_config(config))
