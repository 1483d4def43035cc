"""Whether Triton kernels can run here, asked before the first one is imported."""

import importlib.util
import os
from typing import Any

from torch import Tensor

from quant.errors import MachineError


def require() -> None:
    """Raise MachineError, in one line, if Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        raise MachineError(
            "the CUDA kernels need Triton, which is not installed: run 'pip install triton' (CUDA builds of "
            "torch bring it along), or choose --no-graph"
        )


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1, for tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def operand() -> Any:
    """What the kernels give to a tensor core: bf16; the interpreter multiplies f32 only."""
    import triton.language as tl

    return tl.float32 if interpreted() else tl.bfloat16


def on_device(tensor: Tensor) -> bool:
    """Whether work on ``tensor`` goes to the kernels: True on a GPU; on the CPU the reference is meant.

    Raises MachineError where a GPU tensor meets no Triton.
    """
    if not tensor.is_cuda:
        return False
    require()
    return True
