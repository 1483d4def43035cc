"""The GPU of this machine, measured: memory, its bandwidth, and the bus both ways."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch costs seconds and is imported where a GPU is measured
    import torch

_COPIED = 256 * 2**20
_RUNS = 4


@dataclass(frozen=True)
class Gpu:
    """One GPU: capacity in bytes, bandwidths in GB/s of 10^9 bytes (``h2d`` host to device, pinned memory)."""

    name: str
    vram_bytes: int
    vram_gb_s: float
    h2d_gb_s: float
    d2h_gb_s: float


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
    )


def _copy_rate(target: "torch.Tensor", source: "torch.Tensor") -> float:
    """Best GB/s of several copies, the first of which warms up."""
    import torch

    best = 0.0
    for _ in range(_RUNS + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source, non_blocking=True)
        end.record()
        end.synchronize()
        best = max(best, source.nbytes / start.elapsed_time(end) / 1e6)
    return best
