"""Machine: capacities and measured bandwidths of the machine at hand, or those assumed of another one.

Everything a plan predicts rests on these figures, so they are measured, with the access patterns of the run
itself, and kept per machine and disk: measuring takes seconds, and a run should start at once.
"""

import dataclasses
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from offload.hardware import system as host
from offload.hardware.disk import disk_rate
from offload.hardware.gpu import Gpu, measure_gpu

VERSION = 3
_READ_BYTES = 2**30  # caches of a server keep a visible part of less
_GEMM = (256, 2048, 4096)  # tokens, out and in features: a prompt chunk against one projection
_GEMM_RUNS = 8
_BUSY = 0.1  # share of all cores that others may take while measuring
_BUSY_SECONDS = 60.0  # a doubtful measurement is repeated when it is older, the next one ten times that
_REPEATS = 4  # of reading RAM
_STEADY = 0.85  # what the slowest repeat must reach of the fastest
_FAR_BELOW = 0.75  # of what the same machine has shown before
_RATES = {"ram_gb_s": "RAM", "disk_gb_s": "disk", "int8_gops": "int8 arithmetic"}
Say = Callable[[str], None]


@dataclass(frozen=True)
class Machine:
    """What a plan may count on. Sizes in bytes, bandwidths in GB/s of 10^9 bytes, ``int8_gops`` in 10^9 int8
    operations per second of the CPU's prefill kernel (a multiply-add is two), ``cache_bytes`` L2 and L3
    (0: not known).

    ``ram_available_bytes`` is what this process could take now, limits of its control group included.
    ``measured`` is false for a machine that was described, not probed. ``notes`` are what has to be said
    about the measurement, ``quiet`` whether nothing spoke against it: other programs left the machine alone
    meanwhile, repeats agreed, and no rate was far below what had been measured before. ``doubts`` counts the
    measurements in a row that were not quiet, ``measured_at`` is when (seconds since 1970, 0 if described).
    """

    name: str
    cpu: str
    cores: int
    isa: str
    ram_bytes: int
    ram_available_bytes: int
    ram_gb_s: float
    disk_gb_s: float
    int8_gops: float
    gpu: Gpu | None = None
    cache_bytes: int = 0
    measured: bool = True
    quiet: bool = True
    notes: tuple[str, ...] = ()
    doubts: int = 0
    measured_at: float = 0.0

    @property
    def pcie_gb_s(self) -> float | None:
        """Host to device, the direction that experts travel."""
        return self.gpu.h2d_gb_s if self.gpu else None

    @property
    def vram_gb_s(self) -> float | None:
        """Read bandwidth of the GPU's memory."""
        return self.gpu.vram_gb_s if self.gpu else None

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data, with ``pcie_gb_s`` and ``vram_gb_s`` at top level."""
        return {
            "version": VERSION,
            **dataclasses.asdict(self),
            "notes": list(self.notes),
            "pcie_gb_s": self.pcie_gb_s,
            "vram_gb_s": self.vram_gb_s,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Machine":
        """The machine that ``to_json`` wrote. Raises ValueError, KeyError or TypeError if it is anything
        else.
        """
        if data["version"] != VERSION:
            raise ValueError(f"version {data['version']}")
        values = {field.name: data[field.name] for field in dataclasses.fields(cls)}
        gpu = None if values["gpu"] is None else Gpu(**values["gpu"])
        machine = cls(**{**values, "gpu": gpu, "notes": tuple(values["notes"])})
        if not all(rate > 0 for rate in (machine.ram_gb_s, machine.disk_gb_s, machine.int8_gops)):
            raise ValueError("a rate that is not positive")
        return machine


def probe(directory: Path | None = None, *, refresh: bool = False, say: Say | None = None) -> Machine:
    """This machine, and the disk on which ``directory`` (by default the temporary one) lies.

    Measured in about three seconds the first time and kept in ``$XDG_CACHE_HOME/coldstream``; ``refresh``
    measures again, and so does a later run while a measurement is in doubt: after a minute, then after ten,
    and so on. ``say`` is told when there is something to measure. Raises MachineError if the disk cannot be
    read or the native kernels are missing.
    """
    directory = directory if directory is not None and directory.is_dir() else Path(tempfile.gettempdir())
    ram, available = host.memory()
    kept = _cache_file(directory)
    before = _read(kept)
    machine = None if refresh else before
    if machine is None or _is_due(machine, time.time()):
        if say is not None:
            say("measuring the machine (about three seconds; kept for later runs)")
        machine = judged(_measure(directory, ram, available), before, keep_best=not refresh)
        _write(kept, machine)
    return replace(machine, ram_bytes=ram, ram_available_bytes=available)


def _is_due(machine: Machine, now: float) -> bool:
    """Whether a measurement in doubt is to be repeated: the oftener it was, the later."""
    wait = _BUSY_SECONDS * 10.0 ** max(machine.doubts - 1, 0)
    return not machine.quiet and not machine.measured_at <= now < machine.measured_at + wait


def judged(new: Machine, old: Machine | None, *, keep_best: bool) -> Machine:
    """``new`` beside what the same machine showed before: a rate far below that is said and doubted.

    With ``keep_best`` no rate of a doubtful measurement is below the old one; otherwise the new ones hold.
    """
    if old is None:
        return replace(new, doubts=0 if new.quiet else 1)
    low = [
        f"{name} {getattr(new, rate):.3g}, was {getattr(old, rate):.3g}"
        for rate, name in _RATES.items()
        if getattr(new, rate) < _FAR_BELOW * getattr(old, rate)
    ]
    if low:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(old.measured_at))
        held = "the better figures hold" if keep_best else "the new figures hold"
        note = (
            f"this machine is slower than on {when} ({'; '.join(low)}; in GB/s, Gop/s): something else may "
            f"be using it; {held}, and `coldstream probe --refresh` measures again"
        )
        new = replace(new, quiet=False, notes=(*new.notes, note))
    if new.quiet:
        return replace(new, doubts=0)
    best = {rate: max(getattr(new, rate), getattr(old, rate)) for rate in _RATES} if keep_best else {}
    return replace(new, **best, doubts=old.doubts + 1)


def _measure(directory: Path, ram: int, available: int) -> Machine:
    from quant.kernels import native

    others, everyone = host.cpu_seconds()
    disk = disk_rate(directory)
    nbytes = max(64 * 2**20, min(_READ_BYTES, available // 4))
    gpu = measure_gpu()
    notes = disk.notes
    if gpu is None and host.gpu_driver():
        notes += (f"torch sees no GPU, the driver {host.gpu_driver()}: install a CUDA build of torch to use it",)
    reads = [native.read_bandwidth(nbytes, 0.15) for _ in range(_REPEATS)]
    gemm_rate = _gemm_rate()
    others, everyone = (now - then for now, then in zip(host.cpu_seconds(), (others, everyone), strict=True))
    quiet = others <= _BUSY * everyone
    if not quiet:
        notes += (
            f"other programs used {others / everyone:.0%} of the CPU while this machine was measured: "
            "`coldstream probe --refresh` measures it again",
        )
    elif min(reads) < _STEADY * max(reads):
        quiet = False
        notes += (
            f"RAM gave {min(reads):.3g} to {max(reads):.3g} GB/s in {_REPEATS} readings: the best is taken, "
            "and a later run measures again",
        )
    return Machine(
        name=host.cpu_name() + (f" + {gpu.name}" if gpu else ""),
        cpu=host.cpu_name(),
        cores=native.threads(),
        isa=native.isa(),
        ram_bytes=ram,
        ram_available_bytes=available,
        ram_gb_s=max(reads),
        disk_gb_s=disk.gb_s,
        int8_gops=gemm_rate,
        gpu=gpu,
        cache_bytes=host.cache_bytes(),
        quiet=quiet,
        notes=notes,
        measured_at=time.time(),
    )


def _gemm_rate() -> float:
    """Best 10^9 operations per second of the int4 × int8 matrix product that prefill spends its time in."""
    import torch

    from quant.kernels import native

    tokens, rows, columns = _GEMM
    packed = torch.randint(-(2**31), 2**31 - 1, (rows, columns // 8), dtype=torch.int32)
    weight = native.Weight.from_tensors("int4", packed, torch.full((rows, columns // 128), 0.01, dtype=torch.bfloat16))
    x = torch.randn(tokens, columns)
    out = torch.empty(tokens, rows)
    best = 0.0
    for _ in range(_GEMM_RUNS):
        started = time.perf_counter()
        native.linear(x, weight, out=out)
        best = max(best, 2 * tokens * rows * columns / (time.perf_counter() - started) / 1e9)
    return best


def _cache_file(directory: Path) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    isa = os.environ.get("COLDSTREAM_ISA", "")
    key = [host.cpu_name(), host.physical_cores(), isa, directory.stat().st_dev, host.gpu_driver()]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
    return Path(base) / "coldstream" / f"machine-{digest}.json"


def _read(file: Path) -> Machine | None:
    """What was measured before; None if it was not, or cannot be read any more."""
    try:
        return Machine.from_json(json.loads(file.read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(file: Path, machine: Machine) -> None:
    """Keep ``machine``, whole or not at all; a home that cannot be written only means measuring again."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps(machine.to_json()))
        os.replace(partial, file)
    except OSError:
        return
