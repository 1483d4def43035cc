"""What is asked of NVIDIA's driver directly, because torch does not offer it: pinning memory that is already
there, memory in use before a context exists, and telling the driver's errors from our own.

libcuda (the driver API) and libnvidia-ml are found by name where a driver is installed. A call of the driver
API that fails leaves no error behind for torch's next check to trip over, which one of the runtime API does.
Function and constant names are those of NVIDIA's headers cuda.h and nvml.h.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from quant.errors import MachineError
from quant.sizes import format_size

_PORTABLE, _DEVICEMAP = 1, 2  # CU_MEMHOSTREGISTER_*
# How RuntimeErrors of torch, its libraries (cuBLAS) and Triton begin that mean the GPU, its driver or what
# Triton needs to drive it.
_GPU_ERRORS = ("CUDA error", "CUDA driver error", "Triton Error [CUDA]", "Failed to find C compiler")


@cache
def _cuda() -> Any:
    """libcuda. Raises MachineError if there is none."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise MachineError(f"NVIDIA's driver library cannot be loaded: {error}") from None
    library.cuMemHostRegister_v2.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint]
    library.cuMemHostUnregister.argtypes = [ctypes.c_void_p]
    library.cuMemHostGetDevicePointer_v2.argtypes = [ctypes.POINTER(ctypes.c_uint64), ctypes.c_void_p, ctypes.c_uint]
    library.cuGetErrorName.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
    return library


def _name(status: int) -> str:
    text = ctypes.c_char_p()
    _cuda().cuGetErrorName(status, ctypes.byref(text))
    return (text.value or b"an unknown error").decode()


def pin(address: int, nbytes: int) -> int:
    """Pin ``nbytes`` of host memory at ``address`` (both multiples of the page size) and map them for the
    current device; returns the device's address of them.

    Needs a context (torch has used the GPU). Raises MachineError if the driver refuses.
    """
    library = _cuda()
    status = library.cuMemHostRegister_v2(address, nbytes, _PORTABLE | _DEVICEMAP)
    if status:
        raise MachineError(f"the driver says {_name(status)} to {format_size(nbytes)}")
    device = ctypes.c_uint64()
    status = library.cuMemHostGetDevicePointer_v2(ctypes.byref(device), address, 0)
    if status:
        library.cuMemHostUnregister(address)
        raise MachineError(f"the driver says {_name(status)}, so the GPU cannot read RAM in place")
    return device.value


def unpin(address: int) -> None:
    """Undo ``pin`` at ``address``. A driver that is gone has undone it already."""
    _cuda().cuMemHostUnregister(address)


class _NvmlMemory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def free_vram(bus_id: str) -> int | None:
    """Free bytes of the GPU at PCI ``bus_id`` without a context on it; None where the driver's management
    library is not there or does not tell."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if library.nvmlInit_v2():
        return None
    try:
        handle, memory = ctypes.c_void_p(), _NvmlMemory()
        if library.nvmlDeviceGetHandleByPciBusId_v2(bus_id.encode(), ctypes.byref(handle)):
            return None
        if library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)):
            return None
        return int(memory.free)
    finally:
        library.nvmlShutdown()


def bus_id(index: int) -> str | None:
    """The PCI address of CUDA device ``index``, asked without making a context; None without a driver."""
    try:
        library = _cuda()
    except MachineError:
        return None
    device, text = ctypes.c_int(), ctypes.create_string_buffer(32)
    if library.cuInit(0) or library.cuDeviceGet(ctypes.byref(device), index):
        return None
    if library.cuDeviceGetPCIBusId(text, len(text), device):
        return None
    return text.value.decode()


def has_context(index: int) -> bool:
    """Whether this process has a context on CUDA device ``index``, asked without making one. torch counts
    itself as initialized as soon as it was asked for a device's name, long before there is one."""
    library = _cuda()
    device, flags, active = ctypes.c_int(), ctypes.c_uint(), ctypes.c_int()
    if library.cuInit(0) or library.cuDeviceGet(ctypes.byref(device), index):
        return False
    if library.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(active)):
        return True  # not known: then it cannot be measured either
    return bool(active.value)


@contextmanager
def gpu_errors() -> Iterator[None]:
    """Turn an error of the GPU or its driver into one line; being out of memory is not one of those.

    Raises MachineError.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if not _is_gpu_error(error):
            raise
        first = str(error).splitlines()[0]
        raise MachineError(
            f"the GPU or its driver failed: {first}: start again, and if it stays so, with --device cpu"
        ) from error


def _is_gpu_error(error: RuntimeError) -> bool:
    return isinstance(error, torch.AcceleratorError) or str(error).startswith(_GPU_ERRORS)
