"""What the operating system says of this machine without measuring anything: processor, cores, memory, GPU
driver.

Read from /proc and /sys, so that asking costs microseconds and imports nothing heavy.
"""

import ctypes
import os
import platform
from pathlib import Path

_PROC, _SYS = Path("/proc"), Path("/sys")


def cpu_name() -> str:
    """The processor's name as Linux gives it, or its architecture where it gives none."""
    for line in _lines(_PROC / "cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def physical_cores() -> int:
    """Physical cores this process may run on."""
    allowed = os.sched_getaffinity(0)
    siblings = set()
    for cpu in allowed:
        lines = _lines(_SYS / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(lines[0] if lines else str(cpu))
    return max(1, len(siblings))


def cache_bytes() -> int:
    """Bytes of the L2 and L3 caches of the cores this process may run on; 0 where Linux does not tell.

    In a virtual machine the neighbours may use a part of the L3.
    """
    sizes: dict[tuple[str, str], int] = {}
    for cpu in os.sched_getaffinity(0):
        for index in (_SYS / f"devices/system/cpu/cpu{cpu}/cache").glob("index*"):
            level, kind, size, cpus = (
                "".join(_lines(index / name)[:1]) for name in ("level", "type", "size", "shared_cpu_list")
            )
            if level in ("2", "3") and kind != "Instruction" and size.endswith("K") and size[:-1].isdigit():
                sizes[level, cpus] = int(size[:-1]) * 1024
    return sum(sizes.values())


def memory() -> tuple[int, int]:
    """(all, available) bytes of RAM for this process, the limits of its control groups respected."""
    fields = {line.partition(":")[0]: line.partition(":")[2] for line in _lines(_PROC / "meminfo")}
    total, available = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    for limit, used in _group_limits():
        total, available = min(total, limit), min(available, max(0, limit - used))
    return total, available


def gpu_driver() -> str:
    """A text that changes when the GPUs do, empty without any; asks the driver, not CUDA, which is slow to
    start.
    """
    found = [
        line.partition(":")[2].strip()
        for card in sorted(_PROC.glob("driver/nvidia/gpus/*/information"))
        for line in _lines(card)
        if line.startswith("Model")
    ]
    if not found and Path("/dev/dxg").exists():  # WSL2 has no /proc/driver/nvidia
        found = ["wsl"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return ", ".join(found) + (f" [{visible}]" if found and visible is not None else "")


def cpu_seconds() -> tuple[float, float]:
    """CPU seconds spent since the system started: (by everything but this process, by all cores together).

    Two readings tell how busy others were in between. Time that a hypervisor took away counts as others'.
    """
    fields = next((line.split()[1:9] for line in _lines(_PROC / "stat") if line.startswith("cpu ")), [])
    user, nice, system, idle, iowait, irq, softirq, steal = (int(f) / os.sysconf("SC_CLK_TCK") for f in fields)
    own = os.times()
    busy = user + nice + system + irq + softirq + steal
    return busy - own.user - own.system, busy + idle + iowait


def _group_limits(proc: Path = _PROC, mounted: Path = _SYS / "fs/cgroup") -> list[tuple[int, int]]:
    """(limit, used) of each control group with a memory limit that holds this process.

    File pages that can be dropped at any time do not count as used.
    """
    found = []
    for line in _lines(proc / "self/cgroup"):
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        v1 = bool(controllers)
        base = mounted / "memory" if v1 else mounted
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if v1 else ("memory.max", "memory.current")
        group = Path(name.lstrip("/"))
        for place in (group, *group.parents):
            limit, used = (_number(base / place / file) for file in names)
            if limit is not None and used is not None and limit < 2**62:
                found.append((limit, max(0, used - _droppable(base / place / "memory.stat"))))
    return found


def _droppable(stat: Path) -> int:
    for line in _lines(stat):
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].strip().isdigit() else None


def _lines(path: Path) -> list[str]:
    """The lines of a file of the kernel's, none if this kernel does not have it."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def give_back_freed() -> None:
    """Have the C library give what was freed back to the system, as glibc does of its own accord for large blocks only;
    takes milliseconds. Nothing where it has no such call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
