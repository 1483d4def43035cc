"""Budget: the bytes a run may take of VRAM and RAM: what was asked, or what the machine can give.

A budget is an upper bound. Where more was asked than there is, the plan is made for what there is and says
so: a card that is sold as 24 GB has a little less, and a recipe's budgets are those of the machine in its
name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from offload.hardware.framework import FRAMEWORK_RAM, GIB
from offload.hardware.probe import Machine
from offload.tiers import Tier
from quant.sizes import format_size

_VRAM_PART = 0.95  # where nothing was asked: the desktop and the driver have the rest
_SAME = 0.98  # asked for all there is, give or take what the vendor rounds


@dataclass(frozen=True)
class Budget:
    """Bytes of each tier (``vram`` 0 without a GPU); ``notes`` are what has to be said about them. ``most``
    is what the machine could give at all, by tier."""

    vram: int
    ram: int
    notes: tuple[str, ...] = ()
    most: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, machine: Machine, vram: int | None, ram: int | None) -> "Budget":
        """What was asked of ``machine``, None meaning as much as it can give."""
        notes: list[str] = []
        most = {"vram": machine.gpu.vram_bytes if machine.gpu else 0, "ram": machine.ram_available_bytes}
        return cls(_vram(machine, vram, notes), _ram(machine, ram, notes), tuple(notes), most)

    def with_one_more_gib(self, tier: Tier) -> "Budget | None":
        """This budget and a GiB of ``tier``; None where there is no such tier."""
        if tier == "vram":
            return replace(self, vram=self.vram + GIB) if self.vram else None
        return replace(self, ram=self.ram + GIB) if tier == "ram" else None


def _vram(machine: Machine, asked: int | None, notes: list[str]) -> int:
    if machine.gpu is None:
        if asked:
            notes.append(f"{machine.name} has no GPU that can be used: a budget for VRAM changes nothing")
        return 0
    whole = machine.gpu.vram_bytes
    if asked is None:
        return int(whole * _VRAM_PART)
    if asked * _SAME > whole:
        notes.append(f"a VRAM budget of {format_size(asked)} is more than {machine.gpu.name} has, {format_size(whole)}")
    return min(asked, whole)


def _ram(machine: Machine, asked: int | None, notes: list[str]) -> int:
    free = max(0, machine.ram_available_bytes - FRAMEWORK_RAM)
    if asked is None:
        # Not the last byte: page tables, buffers and other programs grow too.
        return max(0, free - max(GIB // 4, machine.ram_bytes // 32))
    # A process that has loaded the framework already finds less available, by just that.
    if asked <= machine.ram_available_bytes:
        return asked
    notes.append(f"a RAM budget of {format_size(asked)} is more than is free: planned for {format_size(free)}")
    return free
