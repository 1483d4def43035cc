"""Native CPU kernels: y = x · Wᵀ on packed weights, straight from wherever the bytes lie.

Everything here runs on one thread pool of its own, in which the calling thread takes part. Python releases
the interpreter lock during a call; two calls at once wait for each other.
"""

from torch import Tensor

from quant.errors import MachineError
from quant.kernels.attention import Attention, AttentionShape, KvPages
from quant.kernels.library import F64, I32, I64, Pointer, call, choose_isa, counted, isa, library, usable_isas
from quant.kernels.moe import GatedMlp, Job, MoeBlock, MoeResult, mlp
from quant.kernels.product import linear
from quant.kernels.weight import Weight

__all__ = [
    "Attention",
    "AttentionShape",
    "GatedMlp",
    "Job",
    "KvPages",
    "MoeBlock",
    "MoeResult",
    "Weight",
    "dot_rate",
    "isa",
    "isas",
    "keep_awake",
    "linear",
    "mlp",
    "read_bandwidth",
    "read_rate",
    "set_isa",
    "set_threads",
    "thread_note",
    "threads",
]


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
    call("set_threads", I32(count))


def threads() -> int:
    """Threads that a native call uses, the caller included: fewer than wanted where the system starts no more."""
    return counted(int(library().cs_threads()))


def keep_awake(microseconds: int) -> None:
    """For that long, at most a second, have the threads look for work instead of going to sleep between calls: waking
    one takes as long as a small product. Raises MachineError for a time that cannot be."""
    call("keep_awake", I64(microseconds))


def thread_note() -> str:
    """What a user should know of the threads: that the system refused some; empty if it did not."""
    started = threads()
    wanted = int(library().cs_threads_wanted())
    if started >= wanted:
        return ""
    limits = "a limit on processes (ulimit -u) or on memory (ulimit -v)"
    return f"{started} of {wanted} threads compute: the system starts no more of them, by {limits}"


def read_bandwidth(nbytes: int = 1 << 30, seconds: float = 1.0) -> float:
    """GB/s at which all threads together read a buffer of ``nbytes``, repeated for about ``seconds``: what one in ten
    reads of 64 MiB exceeds.

    The yardstick of the memory floor: nothing is computed but a checksum that keeps the reads alive.
    """
    rate = float(library().cs_read_bandwidth(I64(nbytes), F64(seconds)))
    if rate < 0:
        raise MachineError(f"{nbytes} bytes for the bandwidth probe cannot be allocated: ask for fewer")
    return rate


def read_rate(memory: Tensor, seconds: float = 0.1) -> float:
    """GB/s at which all threads together read ``memory``, all of which is there, for about ``seconds``: see
    ``read_bandwidth``. 0 of less than a MiB."""
    return max(0.0, float(library().cs_read_rate(Pointer(memory.data_ptr()), I64(memory.nbytes), F64(seconds))))


def dot_rate(seconds: float = 0.1) -> float:
    """10^9 products of bytes per second, added up, by all threads together, as fast as the instruction goes that the
    kernels use: in registers, which no product of weights is faster than."""
    rate = float(library().cs_dot_rate(F64(seconds)))
    if rate < 0:
        raise MachineError("no memory to time dot products with")
    return rate
