"""Every native test that asks for ``isa`` runs once on each instruction set this machine has."""

from collections.abc import Iterator

import pytest

from quant.kernels import native


@pytest.fixture(params=["avx512bf16", "avx512", "avxvnni", "avx2", "neon", "portable"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param not in native.isas():
        pytest.skip(f"this build or processor does not run {request.param}")
    native.set_isa(request.param)
    yield request.param
    native.set_isa("")


def pytest_configure(config: pytest.Config) -> None:
    """``slow`` marks the tests that build the native code once more."""
    config.addinivalue_line("markers", "slow: takes more than 20 s (deselect with -m 'not slow')")
