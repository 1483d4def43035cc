"""Machines to plan for: round numbers, nothing measured."""

from offload.hardware.gpu import Gpu
from offload.hardware.probe import Machine

GIB = 2**30

RTX_4090 = Gpu(name="RTX 4090", vram_bytes=24 * GIB, vram_gb_s=1008, h2d_gb_s=25, d2h_gb_s=25, bf16_tflops=165)


def machine(*, ram: int = 64 * GIB, ram_gb_s: float = 70, disk_gb_s: float = 6.5, gpu: Gpu | None = None) -> Machine:
    """A machine with ``ram`` bytes, 4 GiB of them taken by others."""
    return Machine(
        name="test machine",
        cpu="test CPU",
        cores=8,
        isa="avx2",
        ram_bytes=ram,
        ram_available_bytes=max(0, ram - 4 * GIB),
        ram_gb_s=ram_gb_s,
        disk_gb_s=disk_gb_s,
        int8_gops=2400,
        gpu=gpu,
        measured=False,
    )
