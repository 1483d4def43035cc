"""The GPU of this machine, measured: memory, its bandwidth, and the bus both ways."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch costs seconds and is imported where a GPU is measured
    import torch

_COPIED = 256 * 2**20
_RUNS = 4
_MATRIX = 4096
_TOGETHER_S = 0.2


@dataclass(frozen=True)
class Gpu:
    """One GPU: capacity in bytes, bandwidths in GB/s of 10^9 bytes (``h2d`` host to device, pinned memory),
    dense bf16 matrix products in 10^12 operations per second, ``together`` what the host's memory gives to
    the bus and the CPU reading at once (None: not measured)."""

    name: str
    vram_bytes: int
    vram_gb_s: float
    h2d_gb_s: float
    d2h_gb_s: float
    bf16_tflops: float
    together_gb_s: float | None = None


def measure_gpu() -> Gpu | None:
    """The GPU that torch would use, measured in about half a second; None if torch sees none."""
    import torch

    if not torch.cuda.is_available():
        return None
    device = torch.device("cuda", torch.cuda.current_device())
    free, _ = torch.cuda.mem_get_info(device)
    nbytes = min(_COPIED, free // 8)
    near = torch.empty(nbytes, dtype=torch.uint8, device=device)
    other = torch.empty_like(near)
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    properties: Any = torch.cuda.get_device_properties(device)
    return Gpu(
        name=properties.name,
        vram_bytes=properties.total_memory,
        vram_gb_s=2 * _copy_rate(other, near),  # a copy reads and writes
        h2d_gb_s=_copy_rate(near, host),
        d2h_gb_s=_copy_rate(host, near),
        bf16_tflops=_product_rate(device),
        together_gb_s=_together(near, host),
    )


def _together(near: "torch.Tensor", host: "torch.Tensor") -> float:
    """GB/s that the host's memory gives to copies over the bus and to the CPU's reads at once."""
    import threading
    import time

    import torch

    from quant.kernels import native

    found: list[float] = []
    reader = threading.Thread(  # outside the interpreter's lock: ctypes
        target=lambda: found.append(native.read_bandwidth(host.nbytes, _TOGETHER_S))
    )
    copies, started = 0, time.perf_counter()
    reader.start()
    while reader.is_alive():  # the bus is never idle while the CPU reads
        near.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        copies += 1
    return found[0] + copies * host.nbytes / (time.perf_counter() - started) / 1e9


def _copy_rate(target: "torch.Tensor", source: "torch.Tensor") -> float:
    """Best GB/s of several copies."""
    return source.nbytes / _best_ms(lambda: target.copy_(source, non_blocking=True)) / 1e6


def _product_rate(device: "torch.device") -> float:
    """Best 10^12 operations per second of a square bf16 product."""
    import torch

    a = torch.randn(_MATRIX, _MATRIX, dtype=torch.bfloat16, device=device)
    out = torch.empty_like(a)
    return 2 * _MATRIX**3 / _best_ms(lambda: torch.mm(a, a, out=out)) / 1e9


def _best_ms(work: Callable[[], object]) -> float:
    """ms of the best of several runs, of which the first warms up."""
    import torch

    times: list[float] = []
    for _ in range(_RUNS + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return min(times[1:])
