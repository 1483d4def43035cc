"""One call quantizes by a recipe, by hand, or by a recipe amended by hand; nothing to do is said."""

from collections.abc import Callable
from pathlib import Path

import pytest

from quant.checkpoint.stored import stored_schemes
from quant.convert.quantize import quantize
from quant.errors import SchemeError, UsageError
from quant.model.hub import resolve_config
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


def test_a_call_that_names_nothing_or_a_scheme_that_is_none_is_refused(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="experts='int4'"):
        quantize(tiny("llama4_text"), tmp_path / "out")
    with pytest.raises(SchemeError, match="int5"):
        quantize(tiny("llama4_text"), tmp_path / "out", experts="int5")
    assert not (tmp_path / "out").exists()
