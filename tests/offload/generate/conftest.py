"""Models of every family that sequences are run on."""

from collections.abc import Callable
from pathlib import Path

import pytest

from quant.convert.convert import convert
from quant.model.families import Role
from quant.scheme import Scheme
from tests.family_checkpoints import FAMILIES as OTHERS
from tests.family_checkpoints import make_family

SCHEMES: dict[Role, Scheme] = {"experts": Scheme("int4", 32), "attention": Scheme("int8", 32)}


@pytest.fixture(scope="module")
def models(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny model of a family, quantized."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("models") / family
            tabled = family not in OTHERS
            source = tiny(family) if tabled else make_family(family, tmp_path_factory.mktemp("source") / family)
            convert(source, made[family], SCHEMES)
        return made[family]

    return get
