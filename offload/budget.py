"""Budget: the bytes a run may take of VRAM and RAM, from what was asked and what the machine has."""

from dataclasses import dataclass, replace

from offload.footprint import FRAMEWORK_RAM
from offload.machine import Machine
from offload.records import Tier
from quant.errors import MachineError
from quant.sizes import format_size

GIB = 2**30
_VRAM_PART = 0.95  # the desktop and the driver have the rest


@dataclass(frozen=True)
class Budget:
    """Bytes of each tier (``vram`` 0 without a GPU); ``notes`` are what has to be said about them."""

    vram: int
    ram: int
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, machine: Machine, vram: int | None, ram: int | None) -> "Budget":
        """What was asked, or where that is None what ``machine`` can give.

        Raises MachineError if more was asked than the machine has in all.
        """
        vram_budget = _vram(machine, vram)
        free = max(0, machine.ram_available_bytes - FRAMEWORK_RAM)
        if ram is None:
            # Not the last byte: the page tables, the reader's buffers and other programs grow too.
            return cls(vram_budget, max(0, free - max(GIB // 4, machine.ram_bytes // 32)))
        if ram > machine.ram_bytes:
            raise MachineError(
                f"--ram {format_size(ram)} is more than {machine.name} has, "
                f"{format_size(machine.ram_bytes)}: ask for less"
            )
        notes: tuple[str, ...] = ()
        if ram > free:
            notes = (
                f"--ram {format_size(ram)} is more than is free now, {format_size(free)} beside Python "
                "itself: end what else runs, or ask for less",
            )
        return cls(vram_budget, ram, notes)

    def with_one_more_gib(self, tier: Tier) -> "Budget | None":
        """This budget and a GiB of ``tier``; None where there is no such tier."""
        if tier == "vram":
            return replace(self, vram=self.vram + GIB) if self.vram else None
        return replace(self, ram=self.ram + GIB) if tier == "ram" else None


def _vram(machine: Machine, vram: int | None) -> int:
    if machine.gpu is None:
        if vram:
            raise MachineError(
                f"--vram {format_size(vram)} was given, but {machine.name} has no GPU that can be used: "
                "leave it out, or plan for another machine with --gpu NAME"
            )
        return 0
    if vram is None:
        return int(machine.gpu.vram_bytes * _VRAM_PART)
    if vram > machine.gpu.vram_bytes:
        raise MachineError(
            f"--vram {format_size(vram)} is more than {machine.gpu.name} has, "
            f"{format_size(machine.gpu.vram_bytes)}: ask for less"
        )
    return vram
