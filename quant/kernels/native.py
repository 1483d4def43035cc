"""Native CPU kernels: y = x · Wᵀ on packed weights, straight from wherever the bytes lie.

Everything here runs on one thread pool of its own, in which the calling thread takes part. Python releases
the interpreter lock during a call; two calls at once wait for each other.
"""

import ctypes

import torch
from torch import Tensor

from quant.errors import MachineError
from quant.kernels.attention import Attention, AttentionShape, KvBuffers
from quant.kernels.library import check, choose_isa, library, usable_isas
from quant.kernels.moe import GatedMlp, Job, MoeBlock, MoeResult, mlp
from quant.kernels.rows import address, float_rows, output_rows
from quant.kernels.weight import Weight

__all__ = [
    "Attention",
    "AttentionShape",
    "GatedMlp",
    "Job",
    "KvBuffers",
    "MoeBlock",
    "MoeResult",
    "Weight",
    "isa",
    "isas",
    "linear",
    "mlp",
    "read_bandwidth",
    "set_isa",
    "set_threads",
    "threads",
]


def isa() -> str:
    """The instruction set in use."""
    name: bytes = library().cs_isa()
    return name.decode()


def isas() -> list[str]:
    """The instruction sets that this build holds and this processor runs, best first."""
    return usable_isas(library())


def set_isa(name: str) -> None:
    """Use instruction set ``name`` (empty: the best) from now on. Raises MachineError if it cannot."""
    choose_isa(library(), name)


def set_threads(count: int) -> None:
    """Use ``count`` threads, caller included; by default the physical cores this process may run on."""
    if not 1 <= count <= 1024:
        raise MachineError(f"{count} threads cannot be started: expected 1 to 1024")
    check(library().cs_set_threads(count), "set_threads")


def threads() -> int:
    """Threads that a native call uses, the caller included."""
    return int(library().cs_threads())


def read_bandwidth(nbytes: int = 1 << 30, seconds: float = 1.0) -> float:
    """Best GB/s at which all threads together read a buffer of ``nbytes``, repeated for about ``seconds``.

    The yardstick of the memory floor: nothing is computed but a checksum that keeps the reads alive.
    """
    rate = float(library().cs_read_bandwidth(ctypes.c_int64(nbytes), ctypes.c_double(seconds)))
    if rate < 0:
        raise MachineError(f"{nbytes} bytes for the bandwidth probe cannot be allocated: ask for fewer")
    return rate


def linear(x: Tensor, weight: Weight, *, exact: bool = False, out: Tensor | None = None) -> Tensor:
    """y = x · Wᵀ, f32 ``[T, N]``, for x ``[T, K]`` (f32; other float dtypes are converted).

    Against int4 and int8 weights x is rounded to int8 per token and group (scale absmax / 127) unless
    ``exact``, which keeps f32 and is slower; plain weights are always exact. Raises SchemeError if the shapes
    do not fit.
    """
    x = float_rows(x, weight.in_features, "x")
    tokens, n = x.shape[0], weight.out_features
    out = torch.empty(tokens, n, dtype=torch.float32) if out is None else output_rows(out, tokens, n)
    status = library().cs_linear(
        ctypes.byref(weight.native), address(x), ctypes.c_int64(x.stride(0)),
        ctypes.c_int64(tokens), address(out), ctypes.c_int64(out.stride(0)), int(exact),
    )  # fmt: skip
    check(status, "linear")
    return out
