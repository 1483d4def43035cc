"""One call quantizes by a recipe, by hand, or by a recipe amended by hand; nothing to do is said."""

from collections.abc import Callable
from pathlib import Path

import pytest

from quant.checkpoint.stored import stored_schemes
from quant.convert.quantize import quantize
from quant.errors import SchemeError, UsageError
from quant.model.hub import resolve_config
from quant.model.mixed_precision import scheme_of
from quant.model.recipe import parse_recipe
from quant.model.shape import ModelShape
from quant.scheme import Scheme


def test_what_is_named_wins_over_the_recipe(tiny: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = quantize(
        str(tiny("llama4_text")), str(out), recipe="fast", experts="int8-g64", attention=Scheme("bf16"), rounding="rtn"
    )
    assert done.path == out
    config = resolve_config(str(out))
    stored = stored_schemes(config, ModelShape.from_config(config))
    assert stored is not None
    assert (stored["experts"], stored["attention"]) == (Scheme("int8", 64), Scheme("bf16"))
    assert stored["shared_expert"] == Scheme("int4")


def test_layers_are_written_in_the_schemes_that_a_recipe_gives_them_in_turn(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = parse_recipe("x", {"weights": {"experts": ["int3-g32", "int2-g32"], "attention": "int8-g32"}})
    done = quantize(tiny("llama4_text"), tmp_path / "out", recipe=recipe, rounding="rtn")
    config = resolve_config(str(done.path))
    shape = ModelShape.from_config(config)
    stored = stored_schemes(config, shape)
    assert stored is not None and len(shape.moe_layers) > 1
    found = [scheme_of(stored, next(shape.expert_linears(layer, 1))) for layer in shape.moe_layers]
    assert found == [(Scheme("int3", 32), Scheme("int2", 32))[i % 2] for i in range(len(found))]
    assert stored["attention"] == Scheme("int8", 32)


def test_a_call_that_names_nothing_or_a_scheme_that_is_none_is_refused(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="experts='int4'"):
        quantize(tiny("llama4_text"), tmp_path / "out")
    with pytest.raises(SchemeError, match="int5"):
        quantize(tiny("llama4_text"), tmp_path / "out", experts="int5")
    assert not (tmp_path / "out").exists()
