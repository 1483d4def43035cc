"""MemoryLedger: each allocation with its tier, role and bytes, reconciled with what the system says."""

import os
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import psutil

from offload.tiers import TIERS, Tier


@dataclass
class MemoryLedger:
    """What the run allocated, by tier and role, in bytes. Set or add as allocations come and go."""

    entries: dict[Tier, dict[str, int]] = field(default_factory=lambda: {tier: defaultdict(int) for tier in TIERS})
    baseline_rss: int = 0

    def add(self, tier: Tier, role: str, nbytes: int) -> None:
        """Count ``nbytes`` more (or, negative, fewer) for ``role`` in ``tier``."""
        self.entries[tier][role] += nbytes

    def total(self, tier: Tier) -> int:
        """Bytes counted in ``tier``."""
        return sum(self.entries[tier].values())

    def snapshot(self) -> dict[str, dict[str, int]]:
        """A plain copy: tier → role → bytes."""
        return {tier: {role: size for role, size in roles.items() if size} for tier, roles in self.entries.items()}


def resident_bytes() -> int:
    """Resident set size of this process in bytes, as the operating system counts it."""
    return int(_process(os.getpid()).memory_info().rss)


@cache
def _process(pid: int) -> psutil.Process:
    """Made once: asked for every token, and making one costs more than asking it."""
    return psutil.Process(pid)


def peak_resident_bytes() -> int:
    """The highest resident set size so far in bytes (``VmHWM``)."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resident_bytes()


def forget_peak() -> bool:
    """Let the peak of resident memory count from now (Linux's ``clear_refs``); False if that is denied.

    Measuring the machine takes memory that the run does not.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
