"""Tests of Triton kernels that ask for ``device`` run in the interpreter, or on the card where one is."""

import os

import pytest
import torch


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the kernels' tensors lie. The interpreter takes CPU tensors."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if request.param == "cuda":
        return torch.device("cuda")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the kernels run on the card that is here, not in the interpreter")
    return torch.device("cpu")
