"""Allowance: what this process may take of a GPU's memory, as the driver counts it, and what it does take.

The driver counts more as ours than tensors: CUDA's context, and the code of kernels as they are first used.
The context is measured when it is made; torch's allocator is held to what the budget leaves beside it and
some room for code, so that the driver's count stays below --vram. What other programs hold is not ours to
plan with.
"""

from dataclasses import dataclass
from functools import cache

import torch

from offload.hardware import cuda_driver as driver
from offload.hardware.framework import FRAMEWORK_VRAM, MIB
from quant.errors import BudgetError
from quant.sizes import format_size

CODE = 96 * MIB  # kernels that are loaded after the context was measured
# What torch's allocator takes beyond the tensors: rounding of dense weights to 2 MiB, the graph's own pool,
# cuBLAS workspaces of two streams (32 MiB each on Hopper).
_ROUNDING = 160 * MIB
_SPARE = 64 * MIB  # left to others where nothing was asked
_PART = 0.95
_NOTICEABLE = 0.02
_STEPS = 16


@dataclass(frozen=True)
class Allowance:
    """Bytes of a GPU: all it has (``total``), what ``others`` hold, what CUDA's ``context`` takes, and the
    ``budget`` that this run keeps to, context included."""

    total: int
    others: int
    context: int
    budget: int
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, total: int, free: int, asked: int | None, context: int | None, reserved: int = 0) -> "Allowance":
        """The allowance on a GPU of which ``free`` bytes are free beside a context of ``context`` bytes
        (None: unknown) and ``reserved`` that torch holds already; ``asked`` is --vram.

        Raises BudgetError if what is left does not even hold the context.
        """
        notes: list[str] = []
        if context is None:
            context = min(FRAMEWORK_VRAM, max(0, total - free - reserved))
            notes.append(f"the driver does not tell what CUDA itself takes of the GPU: {format_size(context)} assumed")
        others = max(0, total - free - context - reserved)
        possible = total - others
        budget = min(int(total * _PART), possible - _SPARE) if asked is None else min(asked, possible)
        if budget < min(asked if asked is not None else int(total * _PART), total) * (1 - _NOTICEABLE):
            notes.append(
                f"other programs hold {format_size(others)} of the GPU's {format_size(total)}: the run keeps "
                f"to {format_size(budget)}"
            )
        if budget - context - CODE <= 0:
            raise BudgetError(
                f"{format_size(budget)} of VRAM can be had and CUDA alone takes "
                f"{format_size(context + CODE)} of it (other programs hold {format_size(others)} of "
                f"{format_size(total)}): end them, {'raise --vram, ' if asked is not None else ''}or use --device cpu"
            )
        return cls(total, others, context, budget, tuple(notes))

    @property
    def planned(self) -> int:
        """What a plan, which counts with FRAMEWORK_VRAM for all that is not a tensor, may give away. One that
        takes a little too much costs a whole segment of expert slots."""
        return self.budget - max(0, self.context + CODE + _ROUNDING - FRAMEWORK_VRAM)

    @classmethod
    def claim(cls, device: torch.device, asked: int | None) -> "Allowance":
        """The allowance on ``device``, to which torch's allocator is held from now on. Raises BudgetError,
        and MachineError if the GPU fails."""
        with driver.gpu_errors():
            index = _index(device)
            context = _context_bytes(index)
            free, total = torch.cuda.mem_get_info(index)
            allowance = cls.of(total, free, asked, context, torch.cuda.memory_reserved(index))
            fraction = (allowance.budget - allowance.context - CODE) / total
            torch.cuda.set_per_process_memory_fraction(fraction, index)  # takes no device without an index
        return allowance

    def explain(self, error: BudgetError) -> BudgetError:
        """``error`` and, where they have a part in it, what other programs hold."""
        if self.others < self.total * _NOTICEABLE:
            return error
        return BudgetError(
            f"{error} (other programs hold {format_size(self.others)} of the GPU's {format_size(self.total)})"
        )


class VramMeter:
    """What this process takes of ``device`` as the driver counts it: all that is in use but what others held
    when the run began. If they take more meanwhile, that counts, too."""

    def __init__(self, device: torch.device, allowance: Allowance) -> None:
        self.device, self.allowance = device, allowance
        self.peak = self._latest = self._asked = 0

    def glance(self) -> int:
        """Bytes a few steps ago at most: asking the driver for every token costs time."""
        self._asked += 1
        return self.used() if self._asked % _STEPS == 1 else self._latest

    def used(self) -> int:
        """Bytes now."""
        free, total = torch.cuda.mem_get_info(self.device)
        used = max(0, total - free - self.allowance.others)
        self.peak, self._latest = max(self.peak, used), used
        return used


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@cache
def _context_bytes(index: int) -> int | None:
    """What the context on GPU ``index`` takes, cuBLAS in it; None where it was there before or the driver
    does not tell. Made and measured once per process."""
    bus = driver.bus_id(index)
    before = None if bus is None or driver.has_context(index) else driver.free_vram(bus)
    reserved = _make_context(torch.device("cuda", index))
    after = None if bus is None else driver.free_vram(bus)
    if before is None or after is None:
        return None
    return max(0, before - after - reserved)


def _make_context(device: torch.device) -> int:
    """Use ``device`` for the first time, cuBLAS too; returns the bytes that torch's allocator then holds."""
    square = torch.ones(64, 64, dtype=torch.bfloat16, device=device)
    torch.mm(square, square)
    torch.cuda.synchronize(device)
    return torch.cuda.memory_reserved(device)
