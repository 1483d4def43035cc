"""Out of memory on the GPU: expert slots are given back to the driver, and the work is tried again."""

from collections.abc import Callable
from typing import TypeVar

import torch

from offload.experts.cache.expert_cache import ExpertCache
from offload.hardware.cuda_driver import gpu_errors
from quant.errors import MachineError

_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
_SAID = ("Triton Error [CUDA]: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
Result = TypeVar("Result")


def retry_with_less_vram(work: Callable[[], Result], cache: ExpertCache) -> Result:
    """The result of ``work``. As long as the GPU's memory does not suffice for it, ``cache`` gives slots back and
    ``work`` is called again, so a failed call must leave nothing half done.

    Raises MachineError if the GPU fails, or no slots are left to give.
    """
    while True:
        with gpu_errors():
            try:
                return work()
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                found = str(error).partition(". ")[0].splitlines()[0]
        # Outside the handler: the error's traceback keeps tensors alive.
        if not cache.shrink_vram():
            raise MachineError(
                f"the GPU has no memory left, nor any expert slots to give back ({found}): end what else "
                "runs on it, or start again with less --context"
            )


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether ``error`` is torch's allocator's, or the driver's own for what torch does not allocate:
    kernels' code, which Triton loads, and what cuBLAS needs."""
    if isinstance(error, torch.OutOfMemoryError) or getattr(error, "error_code", None) == _OUT_OF_MEMORY:
        return True
    return any(said in str(error) for said in _SAID)
