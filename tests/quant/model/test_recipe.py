"""Recipes say what they mean, and a key that means nothing is an error."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from quant.errors import CheckpointError, RecipeError, UsageError
from quant.model.families import is_tabled
from quant.model.hub import resolve_config
from quant.model.known_shapes import load_shape, shape_names
from quant.model.mixed_precision import scheme_of
from quant.model.recipe import load_recipe, parse_recipe, recipe_names
from quant.model.shape import ModelShape
from quant.scheme import BF16, Scheme


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_that_ships_loads_and_says_what_it_is_for(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.description and recipe.schemes["experts"].is_packed


def test_a_role_that_is_not_named_stays_bf16_and_one_may_have_its_own_groups() -> None:
    recipe = parse_recipe("x", {"weights": {"experts": "int4-g32", "lm_head": "int8"}, "run": {"ram": "2.5GiB"}})
    assert recipe.schemes == {"experts": Scheme("int4", 32), "lm_head": Scheme("int8", 128)}
    assert recipe.ram == int(2.5 * 2**30)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"weight": {}}, "unknown key weight"),
        ({"weights": {"expert": "int4"}}, "unknown key weights.expert"),
        ({"weights": {"experts": "int5"}}, None),
        ({"weights": {"experts": []}}, None),
        ({"weights": {"experts": ["int4", "int5"]}}, "weights.experts"),
        ({"weights": {"attention": ["int4", "int8"]}}, "weights.attention"),
        ({"weights": 3}, "expected a table"),
        ({"weights": {"group_size": "128"}}, "expected a whole number"),
        ({"run": {"vram": "24 potatoes"}}, "run.vram: bad size"),
        ({"run": {"context": 0}}, "expected a whole number above 0"),
        ({"run": {"kv": "int2"}}, "expected 'bf16' or 'int8'"),
    ],
)
def test_a_bad_recipe_is_refused_by_key(data: dict[str, object], message: str | None) -> None:
    from quant.errors import ColdstreamError

    with pytest.raises(ColdstreamError, match=message):
        parse_recipe("x", data)


def test_layers_with_experts_take_a_list_of_schemes_in_turn() -> None:
    weights = {"experts": ["int3", "int3-g64", "int2"], "dense_mlp": "int4", "attention": "int8"}
    recipe = parse_recipe("x", {"weights": weights})
    maverick = ModelShape.from_config(load_shape("maverick"))
    schemes = recipe.schemes_of(maverick)
    found = {linear.layer: scheme_of(schemes, linear) for linear in maverick.linears() if linear.role == "experts"}
    turns = [Scheme("int3", 128), Scheme("int3", 64), Scheme("int2", 128)]
    assert [found[layer] for layer in maverick.moe_layers] == turns * 8
    dense = {linear.role: scheme_of(schemes, linear) for linear in maverick.dense_linears()}
    assert dense["dense_mlp"] == Scheme("int4", 128) and dense["attention"] == Scheme("int8", 128)
    assert dense["shared_expert"] == dense["lm_head"] == BF16
    assert recipe.schemes_of(maverick, {"experts": Scheme("int4", 32)})["experts"] == Scheme("int4", 32)
    one = parse_recipe("x", {"weights": {"experts": ["int4"]}}).schemes_of(maverick)
    assert one == {"experts": Scheme("int4", 128)}


def test_unknown_names_list_the_known(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="scout-rtx4090"):
        load_recipe("scout")
    with pytest.raises(UsageError, match="maverick"):
        load_shape("llama")
    with pytest.raises(CheckpointError, match="mini-scout"):
        resolve_config(str(tmp_path / "nowhere"))
    (tmp_path / "r.toml").write_text("weights = [")
    with pytest.raises(RecipeError, match="no valid TOML"):
        load_recipe(str(tmp_path / "r.toml"))


# As their publishers count them. Those of other families are held by README's table.
BILLIONS = {
    "scout": 109,
    "maverick": 402,
    "mini-scout": 7.1,
    "mixtral-8x7b": 46.7,
    "qwen3-30b-a3b": 30.5,
    "olmoe-1b-7b": 6.9,
}


def test_shapes_have_the_announced_number_of_weights() -> None:
    tabled = {name: load_shape(name) for name in shape_names() if is_tabled(load_shape(name)["model_type"])}
    shapes = {name: ModelShape.from_config(config) for name, config in tabled.items()}
    totals = {name: sum(shape.role_nbytes({}).values()) / 2e9 for name, shape in shapes.items()}
    assert 2000 <= totals.pop("behemoth") <= 2200
    assert totals == pytest.approx(BILLIONS, rel=0.01)


def _pipe(file: Path) -> None:
    os.mkfifo(file)


@pytest.mark.parametrize(
    ("lay", "said"),
    [
        (Path.mkdir, "is a directory: expected a file"),
        (_pipe, "is a named pipe: expected a file"),
        (lambda file: file.symlink_to(file.name + ".gone"), "is a link to"),
        (lambda file: file.write_bytes(b"\xff\xfe"), "no valid TOML"),
        (lambda file: file.write_bytes(b"#" * (2**20 + 1)), "expected at most 1,048,576"),
        (lambda file: file.write_text("[run]\ncontext = 99999999999999999999"), "run.context is 99999999999999999999"),
        (lambda file: file.write_text("[run]\nprompt_chunk = nan"), "run.prompt_chunk is nan"),
        (lambda file: file.write_text("[run]\nvram = inf"), "run.vram"),
        (lambda file: file.write_text("[run]\nram = [1]"), "run.ram"),
        (lambda file: file.write_text("[weights]\ngroup_size = true"), "weights.group_size is True"),
        (lambda file: file.write_text("[weights]\nexperts = {}"), "weights.experts"),
        (lambda file: file.write_text("weights = 3"), "weights is 3"),
        (lambda file: file.write_text("description = 3"), "description is 3"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_line(lay: Callable[[Path], object], said: str, tmp_path: Path) -> None:
    lay(tmp_path / "my.toml")
    with pytest.raises(RecipeError, match=said) as refusal:
        load_recipe(str(tmp_path / "my.toml"))
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 300
