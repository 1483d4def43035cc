"""Without Triton everything imports, and asking for its kernels gives one clear line."""

import importlib.util
import subprocess
import sys

import pytest
import torch

from quant.errors import MachineError
from quant.kernels.cuda import runtime

WITHOUT_TRITON = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import quant.linear
from quant.kernels.cuda import attention, bell, experts, fused, layout, linear, prefill

assert "triton" not in sys.modules
"""


def test_nothing_imports_triton_until_a_kernel_is_launched() -> None:
    run = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_missing_triton_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match="pip install triton") as caught:
        runtime.require()
    assert "\n" not in str(caught.value)


def test_tensors_on_the_cpu_ask_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not runtime.on_device(torch.zeros(1))
