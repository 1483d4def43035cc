"""A GPU whose memory runs out, or that fails: slots are given back, or one line says it."""

import pytest
import torch

from offload.experts.cache.expert_cache import ExpertCache
from offload.experts.cache.oom import retry_with_less_vram
from offload.hardware.cuda_driver import gpu_errors
from quant.errors import MachineError


class Slots(ExpertCache):
    """Device slots that can be given back ``times`` times."""

    def __init__(self, times: int) -> None:
        self.times = times

    def shrink_vram(self) -> int:
        self.times -= 1
        return 2**20 if self.times >= 0 else 0


def needing(tries: int, error: RuntimeError) -> tuple[list[int], object]:
    """Work that fails with ``error`` until it was tried ``tries`` times."""
    tried: list[int] = []

    def work() -> int:
        tried.append(1)
        if len(tried) < tries:
            raise error
        return len(tried)

    return tried, work


@pytest.mark.parametrize("driver_says_it", [False, True])
def test_slots_are_given_back_until_the_work_fits(driver_says_it: bool) -> None:
    error: RuntimeError = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    if driver_says_it:
        error = torch.AcceleratorError("CUDA error: out of memory")
        error.error_code = 2  # type: ignore[attr-defined]
    cache = Slots(5)
    _, work = needing(3, error)
    assert retry_with_less_vram(work, cache) == 3  # type: ignore[arg-type]
    assert cache.times == 3


@pytest.mark.parametrize(
    "said",
    [
        "Triton Error [CUDA]: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_code_that_finds_no_memory_is_given_some(said: str) -> None:
    cache = Slots(5)
    _, work = needing(2, RuntimeError(said))
    assert retry_with_less_vram(work, cache) == 2  # type: ignore[arg-type]
    assert cache.times == 4


def test_a_kernel_that_cannot_be_launched_is_one_line() -> None:
    _, work = needing(2, RuntimeError("Triton Error [CUDA]: device kernel image is invalid"))
    with pytest.raises(MachineError, match="the GPU or its driver failed: Triton Error"):
        retry_with_less_vram(work, Slots(5))  # type: ignore[arg-type]


def test_with_nothing_left_to_give_one_line_says_so() -> None:
    _, work = needing(9, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"))
    with pytest.raises(MachineError, match=r"no memory left.*\(CUDA out of memory\)") as raised:
        retry_with_less_vram(work, Slots(2))  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)


def test_a_failing_gpu_is_one_line_and_not_tried_again() -> None:
    tried, work = needing(2, torch.AcceleratorError("CUDA error: unspecified launch failure\nCompile with ..."))
    with pytest.raises(MachineError, match="the GPU or its driver failed: CUDA error: unspecified") as raised:
        retry_with_less_vram(work, Slots(5))  # type: ignore[arg-type]
    assert len(tried) == 1 and "\n" not in str(raised.value)


def test_errors_of_our_own_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"), gpu_errors():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
