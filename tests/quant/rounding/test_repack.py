"""Integers that somebody else found are kept: the same numbers in the layout that runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.convert.convert import convert
from quant.errors import UsageError
from quant.model.mixed_precision import scheme_of
from quant.pack import dequantize
from quant.rounding.repack import Repacked, own_schemes
from quant.rounding.rounding import Nearest
from quant.scheme import BF16, Scheme
from quant.sources.open import open_source
from tests.quant.dequantized import packed_weights
from tests.quant.sources.foreign import foreign
from tests.quant.sources.test_float8 import compressed as float8
from tests.quant.sources.test_gptq import CONFIG, gptq
from tests.quant.sources.test_integers import compressed

Tiny = Callable[..., Path]
SMALL = {"num_hidden_layers": 2, "num_local_experts": 4}
GPTQ = (gptq, CONFIG)


@pytest.mark.parametrize(
    ("form", "scheme", "most"),
    [
        (compressed(4, "group", True, "pack-quantized", 32), Scheme("int4", 32), 0.0),
        (compressed(8, "channel", True, "int-quantized"), Scheme("int8", 128), 0.0),
        (compressed(8, "tensor", True, "int-quantized"), Scheme("int8", 128), 0.0),
        (GPTQ, Scheme("int4", 32), 0.002),
    ],
    ids=["int4 in groups", "int8 by channel", "int8 by tensor", "GPTQ, f16 scales"],
)
def test_weights_are_the_sources_own(tiny: Tiny, tmp_path: Path, form: Any, scheme: Scheme, most: float) -> None:
    meant = foreign(tiny("mixtral", **SMALL), tmp_path / "source", *form)
    source = open_source(tmp_path / "source")
    schemes = own_schemes(source)
    assert {scheme_of(schemes, linear) for linear in source.shape.linears()} == {scheme}
    report = convert(source, tmp_path / "out", schemes, rounder=Repacked(source, Nearest()))
    found = packed_weights(tmp_path / "out")
    assert {f"{module}.weight" for module in found} == meant.keys()
    for key in meant:
        dense, exact = dequantize(found[key.removesuffix(".weight")]), source.read(key)
        assert (dense - exact).abs().max() <= most * exact.abs().max(), key
    assert all(role.relative_error <= most for role in report.roles)


def test_only_integers_in_order_and_without_zero_points_are_kept(tiny: Tiny, tmp_path: Path) -> None:
    forms = {
        "zero points": compressed(4, "group", False, "pack-quantized", 32),
        "order": (lambda weight: gptq(weight, acts=True), CONFIG),
        "fp8": float8("channel"),
    }
    for name, form in forms.items():
        foreign(tiny("mixtral", **SMALL), tmp_path / name, *form)
        with pytest.raises(UsageError, match=r"--repack keeps symmetric int4 and int8 as they are.*has none"):
            own_schemes(open_source(tmp_path / name))
    with pytest.raises(UsageError, match="has none"):
        own_schemes(open_source(tiny("mixtral", **SMALL)))


def test_another_scheme_is_rounded_as_without_it(tiny: Tiny, tmp_path: Path) -> None:
    foreign(tiny("mixtral", **SMALL), tmp_path / "source", *GPTQ)
    source, schemes = open_source(tmp_path / "source"), {"experts": Scheme("int8"), "attention": BF16}
    for name, rounder in (("out", Repacked(source, Nearest())), ("expected", Nearest())):
        convert(source, tmp_path / name, schemes, rounder=rounder)  # type: ignore[arg-type]
    found, expected = packed_weights(tmp_path / "out"), packed_weights(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key].packed, expected[key].packed) for key in expected)
