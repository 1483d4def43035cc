"""The demo model, quantized once for all commands that run one."""

from pathlib import Path

import pytest

from quant.convert.convert import convert
from quant.scheme import Scheme


@pytest.fixture(scope="session")
def model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    destination = tmp_path_factory.mktemp("quantized") / "demo-int4"
    convert(demo_model, destination, {"experts": Scheme("int4"), "shared_expert": Scheme("int4")})
    return destination
