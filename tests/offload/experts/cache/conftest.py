"""The store that tests of caches share."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from quant.convert.convert import convert
from quant.scheme import Scheme
from tests.offload.tiers import Bench


@pytest.fixture(scope="module")
def bench(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """4 layers of 8 experts in int4."""
    destination = tmp_path_factory.mktemp("tiers") / "model"
    convert(tiny("llama4_text"), destination, {"experts": Scheme("int4")})
    made = Bench(destination)
    yield made
    made.reader.close()
