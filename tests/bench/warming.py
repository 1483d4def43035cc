"""How much shorter a missed expert takes when the CPU has read its beginning into its caches just before.

    python -m tests.bench.warming

Experts of Scout's size in int4, the doorbell's own server, no GPU: a hint, time to follow it, a pause, then a
request. Every request is of another expert than the last eleven. Rounds in which threads were interrupted do
not count.
"""

import json
import resource
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from offload.experts.storage.arena import Arena
from quant.kernels import native
from quant.kernels.cuda.doorbell import RUNG, BellBuffers, HostBell, first_byte, store_release
from quant.kernels.moe import GatedMlp
from quant.kernels.native import Weight

HIDDEN, INTER, GROUP, EXPERTS = 5120, 8192, 128, 12
MIB = 2**20
BUDGETS = (0, 4 * MIB, 8 * MIB, 16 * MIB, 24 * MIB)
PAUSE_S = 0.1e-3
_AWAKE_US = 60_000_000


def expert(slot: Tensor, inter: int, generator: torch.Generator) -> GatedMlp:
    """Random weights in ``slot``, and scales of such a size that nothing overflows."""
    parts, at = [], 0
    for rows, columns in ((inter, HIDDEN), (inter, HIDDEN), (HIDDEN, inter)):
        packed = slot[at : at + rows * columns // 2].view(torch.int32).view(rows, columns // 8)
        packed.random_(-(2**31), 2**31 - 1, generator=generator)
        at += packed.nbytes
        scale = slot[at : at + rows * columns // GROUP * 2].view(torch.bfloat16).view(rows, columns // GROUP)
        at += scale.fill_(0.002).nbytes
        parts.append(Weight.from_tensors("int4", packed, scale))
    return GatedMlp(*parts)


def measure(budgets: Sequence[int] = BUDGETS, rounds: int = 30, inter: int = INTER) -> dict[str, Any]:
    """Median ms of a request by how many MiB were read ahead, MB of an expert, and the GB/s of reading ahead
    (``reading_gb_s``) and of products from the caches (``cached_gb_s``, from the largest budget)."""
    generator = torch.Generator().manual_seed(1)
    nbytes = 3 * HIDDEN * inter // 2 + 3 * HIDDEN * inter // GROUP * 2
    arena = Arena(EXPERTS, -(-nbytes // 4096) * 4096)
    made = [expert(arena.slot(index), inter, generator) for index in range(EXPERTS)]
    buffers = BellBuffers.allocate(1, 1, HIDDEN, torch.device("cpu"))
    buffers.x.normal_(generator=generator)
    buffers.scores.fill_(1.0)
    table = torch.zeros(1, EXPERTS, dtype=torch.int64)
    bell = HostBell(buffers, made[:1], table, scales_input=False, exact=False, prefetch_bytes=1)
    bell._bell.keep_awake = _AWAKE_US
    for index, one in enumerate(made):
        bell.table[0, index] = first_byte(one)
    took: dict[int, list[float]] = {budget: [] for budget in budgets}
    reading: list[float] = []
    for turn in range(rounds * len(budgets)):
        budget, index = budgets[turn % len(budgets)], turn % EXPERTS
        bell.prefetch_bytes = budget
        switches, read = _switches(), bell.prefetched.nbytes
        store_release(buffers.hint, 0, 1 + index)
        started = time.perf_counter()
        bell.serve(1)
        followed = time.perf_counter()
        while time.perf_counter() < followed + PAUSE_S:
            pass
        buffers.request[:6] = torch.tensor([0, 1, 1, 0, index, 0], dtype=torch.int32)
        buffers.sequence.add_(1)
        asked = time.perf_counter()
        store_release(buffers.control, RUNG, int(buffers.sequence))
        bell.serve(1)
        seconds = time.perf_counter() - asked
        if _switches() == switches and turn >= len(budgets):
            took[budget].append(seconds)
            if budget == max(budgets):
                reading.append((bell.prefetched.nbytes - read) / (followed - started) / 1e9)
    ms = {budget / MIB: 1e3 * statistics.median(found) for budget, found in took.items() if found}
    found: dict[str, Any] = {
        "expert_mb": nbytes / 1e6,
        "threads": native.threads(),
        "isa": native.isa(),
        "ms_by_mib": ms,
        "rounds": {budget / MIB: len(found) for budget, found in took.items()},
        "reading_gb_s": statistics.median(reading) if reading else None,
    }
    most = max(budgets) / MIB
    if 0.0 in ms and most in ms and most:
        # ms = (bytes - warmed) / rate + warmed / cached
        warmed = most * MIB
        left = ms[most] / 1e3 - (nbytes - warmed) / nbytes * ms[0.0] / 1e3
        found["cached_gb_s"] = warmed / left / 1e9 if left > 0 else None
    return found


def _switches() -> int:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_nivcsw + used.ru_nvcsw


if __name__ == "__main__":
    print(json.dumps(measure()))
