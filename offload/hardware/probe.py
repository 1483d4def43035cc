"""Machine: capacities and measured bandwidths of the machine at hand, or those assumed of another one.

Everything a plan predicts rests on these figures, so they are measured, with the access patterns of the run
itself, and kept per machine and disk: measuring takes seconds, and a run should start at once.
"""

import dataclasses
import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from offload.hardware import system as host
from offload.hardware.disk import disk_rate
from offload.hardware.gpu import Gpu, measure_gpu
from quant.errors import OutputError
from quant.input_file import read_object
from quant.output_file import replace_file

_VERSION = 4
_READ_BYTES = 2**30  # of RAM, as often as it is read: caches of a server keep a visible part of less
_READ_SECONDS = 0.08
_GEMM = (256, 2048, 4096)  # tokens, out and in features: a prompt chunk against one projection
_GEMM_RUNS = 8
_BUSY = 0.1  # share of all cores that others may take while measuring
_BUSY_SECONDS = 60.0  # a doubtful measurement is repeated when it is older, the next one ten times that
_REPEATS = 8  # of reading RAM, half of them before everything else and half after
_BETTER = 4  # one in so many repeats may seem better than RAM is: memory that a cache happens to hold
_LOOK_BYTES = 192 * 2**20  # of a glance at RAM, at the least four times the caches
_LOOK_SECONDS = 0.04
_LOOK_EVERY = 60.0  # seconds that a glance is good for
_ABOVE = 1.08  # of what was measured: a glance that reads so much more has disproved it
_STEADY = 0.85  # what the slowest repeat must reach of the fastest
_FAR_BELOW = 0.75  # of what the same machine has shown before
_FAR_ABOVE = 1.15
_RATES = {"ram_gb_s": "RAM", "disk_gb_s": "disk", "int8_gops": "int8 arithmetic"}
_NOW = " GB/s now, of the "  # in the note of a glance
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
    measurements in a row that were not quiet, ``measured_at`` is when (seconds since 1970, 0 if described) and
    ``looked_at`` when RAM was last glanced at since.
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
    looked_at: float = 0.0

    @property
    def doubt(self) -> str:
        """Why nobody should build on these rates; empty if nothing speaks against them. ``notes`` say more."""
        if self.measured and not self.quiet:
            return "the machine was disturbed while it was measured: floor and prediction are unreliable"
        if any(_NOW in note for note in self.notes):
            return "RAM was slower before the run than when it was measured: floor and prediction are unreliable"
        return ""

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
            "version": _VERSION,
            **dataclasses.asdict(self),
            "notes": list(self.notes),
            "pcie_gb_s": self.pcie_gb_s,
            "vram_gb_s": self.vram_gb_s,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Machine":
        """The machine that ``to_json`` wrote. Raises ValueError if it is anything else."""
        if data.get("version") != _VERSION:
            raise ValueError(f"version {data.get('version')}")
        machine = TypeAdapter(cls).validate_json(json.dumps(data), strict=True)
        found = [machine.cores, machine.ram_bytes, machine.ram_gb_s, machine.disk_gb_s, machine.int8_gops]
        if machine.gpu is not None:
            given = dataclasses.asdict(machine.gpu).values()
            found += [value for value in given if isinstance(value, int | float)]
        if not all(0 < value < math.inf for value in found):
            raise ValueError("a size or rate that is not positive and finite")
        return machine


def probe(directory: str | Path | None = None, *, refresh: bool = False, say: Say | None = None) -> Machine:
    """This machine, and the disk on which ``directory`` (by default the temporary one) lies.

    Measured in about three seconds the first time and kept in ``$XDG_CACHE_HOME/coldstream``; ``refresh``
    measures again, and so does a later run while a measurement is in doubt: after a minute, then after ten,
    and so on. What is kept is compared with a glance at RAM, once a minute at most: memory that is faster now
    is measured again, slower memory is said to be so. ``say`` is told when there is something to measure.
    Raises MachineError if the disk cannot be read or the native kernels are missing.
    """
    directory = Path(directory) if directory is not None and Path(directory).is_dir() else Path(tempfile.gettempdir())
    ram, available = host.memory()
    kept = _cache_file(directory)
    before = _read(kept)
    machine, now, glance = None if refresh else before, time.time(), 0.0
    if machine is not None and not machine.looked_at <= now < machine.looked_at + _LOOK_EVERY:
        glance = _read_ram(_look_bytes(machine, available), _LOOK_SECONDS)
        machine = compared(replace(machine, looked_at=now), glance)
        if machine is not None:
            _write(kept, machine)
    if machine is None or _is_due(machine, now):
        if say is not None:
            say("measuring the machine (about three seconds; kept for later runs)")
        measured = _measure(directory, ram, available)
        measured = replace(measured, ram_gb_s=max(measured.ram_gb_s, glance))
        machine = judged(measured, before, keep_best=not refresh)
        _write(kept, machine)
        machine = replace(machine, notes=(*machine.notes, *faster(measured, before)))
    return replace(machine, ram_bytes=ram, ram_available_bytes=available)


def compared(machine: Machine, ram_gb_s: float) -> Machine | None:
    """``machine`` beside a glance at its RAM: None if it is faster than it was measured, which must be done again;
    with a note if it is far slower."""
    if ram_gb_s > _ABOVE * machine.ram_gb_s:
        return None
    notes = tuple(note for note in machine.notes if _NOW not in note)
    if ram_gb_s < _FAR_BELOW * machine.ram_gb_s:
        notes += (
            f"RAM gives {ram_gb_s:.3g}{_NOW}{machine.ram_gb_s:.3g} that were measured: something else uses it, or its "
            "speed varies, and predictions are as uncertain",
        )
    return replace(machine, notes=notes)


def read_again(directory: Path, *, ram: bool, disk: bool) -> tuple[float | None, float | None]:
    """GB/s of RAM and of the disk of ``directory``, each as far as asked for. Raises MachineError if the disk cannot be
    read."""
    found = _steady(_ram_rates(host.memory()[1], _REPEATS))[1] if ram else None
    return found, disk_rate(directory).gb_s if disk else None


def keep_better(directory: Path, *, ram_gb_s: float | None, disk_gb_s: float | None) -> None:
    """Raise what is kept of this machine and the disk of ``directory`` to these rates, where they are higher."""
    kept = _cache_file(directory)
    machine = _read(kept)
    if machine is not None:
        ram, disk = max(machine.ram_gb_s, ram_gb_s or 0), max(machine.disk_gb_s, disk_gb_s or 0)
        if (ram, disk) != (machine.ram_gb_s, machine.disk_gb_s):
            _write(kept, replace(machine, ram_gb_s=ram, disk_gb_s=disk))


def _look_bytes(machine: Machine, available: int) -> int:
    return max(2**20, min(max(_LOOK_BYTES, 4 * machine.cache_bytes), available // 4))


def _ram_rates(available: int, times: int) -> list[float]:
    """GB/s of RAM, read that often. Before and after a run it is as much memory that is read, where that much is
    available: half as much is read up to a fifth faster where caches are large."""
    nbytes = max(64 * 2**20, min(_READ_BYTES, available // 4))
    return [_read_ram(nbytes, _READ_SECONDS) for _ in range(times)]


def _steady(rates: list[float]) -> tuple[float, float]:
    """What all but a few of ``rates`` exceed, and what only those exceed that were lucky."""
    ordered = sorted(rates)
    few = len(ordered) // _BETTER
    return ordered[few], ordered[-1 - few]


def _read_ram(nbytes: int, seconds: float) -> float:
    from quant.kernels import native

    return native.read_bandwidth(nbytes, seconds)


def _is_due(machine: Machine, now: float) -> bool:
    """Whether a measurement in doubt is to be repeated: the oftener it was, the later."""
    wait = _BUSY_SECONDS * 10.0 ** max(machine.doubts - 1, 0)
    return not machine.quiet and not machine.measured_at <= now < machine.measured_at + wait


def faster(new: Machine, old: Machine | None) -> list[str]:
    """A note if a rate is far above what the same machine showed before; told once, and not kept."""
    if old is None:
        return []
    high = [
        f"{name} {getattr(new, rate):.3g}, was {getattr(old, rate):.3g}"
        for rate, name in _RATES.items()
        if getattr(new, rate) > _FAR_ABOVE * getattr(old, rate)
    ]
    return [
        f"this machine is faster than on {_when(old)} ({'; '.join(high)}; in GB/s, Gop/s): that measurement was "
        "disturbed, or its speed varies"
    ] * bool(high)


def _when(machine: Machine) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(machine.measured_at))


def judged(new: Machine, old: Machine | None, *, keep_best: bool) -> Machine:
    """``new`` beside what the same machine showed before: a rate far below that is said and doubted.

    With ``keep_best`` no rate of a doubtful measurement is below the old one; otherwise the new ones hold.
    """
    if old is None:
        return replace(new, doubts=0 if new.quiet else 1)
    was = {rate: getattr(old, rate) for rate in _RATES}
    said = {rate: f"{name} {getattr(new, rate):.3g}, was {was[rate]:.3g}" for rate, name in _RATES.items()}
    low = [said[rate] for rate in _RATES if getattr(new, rate) < _FAR_BELOW * was[rate]]
    if low:
        held = "the better figures hold" if keep_best else "the new figures hold"
        note = (
            f"this machine is slower than on {_when(old)} ({'; '.join(low)}; in GB/s, Gop/s): something else may "
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
    reads = _ram_rates(available, _REPEATS // 2)
    disk = disk_rate(directory)
    gpu = measure_gpu()
    notes = disk.notes
    if gpu is None and host.gpu_driver():
        notes += (f"torch sees no GPU, the driver {host.gpu_driver()}: install a CUDA build of torch to use it",)
    gemm_rate = _gemm_rate()
    reads += _ram_rates(available, _REPEATS - len(reads))
    low, high = _steady(reads)
    others, everyone = (now - then for now, then in zip(host.cpu_seconds(), (others, everyone), strict=True))
    quiet = others <= _BUSY * everyone
    if not quiet:
        notes += (
            f"other programs used {others / everyone:.0%} of the CPU while this machine was measured: "
            "`coldstream probe --refresh` measures it again",
        )
    elif low < _STEADY * high:
        quiet = False
        notes += (
            f"RAM gave {min(reads):.3g} to {max(reads):.3g} GB/s in {_REPEATS} readings: {high:.3g} is taken, "
            "and a later run measures again",
        )
    return Machine(
        name=host.cpu_name() + (f" + {gpu.name}" if gpu else ""),
        cpu=host.cpu_name(),
        cores=native.threads(),
        isa=native.isa(),
        ram_bytes=ram,
        ram_available_bytes=available,
        ram_gb_s=high,
        disk_gb_s=disk.gb_s,
        int8_gops=gemm_rate,
        gpu=gpu,
        cache_bytes=host.cache_bytes(),
        quiet=quiet,
        notes=notes,
        measured_at=time.time(),
        looked_at=time.time(),
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
        return Machine.from_json(read_object(file, "what was measured", OutputError))
    except (OutputError, ValueError):
        return None


def _write(file: Path, machine: Machine) -> None:
    """Keep ``machine``, whole or not at all; a home that cannot be written only means measuring again."""
    with suppress(OSError, OutputError):
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, json.dumps(machine.to_json()).encode())
