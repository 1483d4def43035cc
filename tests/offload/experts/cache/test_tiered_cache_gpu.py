"""The same on a real GPU: copies in order, pinned memory, and the driver's count of what is ours."""

import gc
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from offload.experts.cache.address_table import VRAM
from offload.experts.storage.arena import Arena
from offload.experts.storage.transfer import CudaTransfer
from offload.hardware import cuda_driver as driver
from offload.hardware.vram_limit import Allowance, VramMeter
from quant.errors import MachineError
from tests.offload.tiers import Bench

pytestmark = pytest.mark.gpu
MIB = 2**20
ROOT = Path(__file__).resolve().parents[4]

# In a process of its own: the context can be measured only before there is one.
FILLS_THE_BUDGET = f"""
import torch
from offload.hardware.vram_limit import Allowance, VramMeter
device = torch.device("cuda")
allowance = Allowance.claim(device, 2048 * {MIB})
meter = VramMeter(device, allowance)
held = []
try:
    while True:
        held.append(torch.empty(16 * {MIB}, dtype=torch.uint8, device=device))
except torch.OutOfMemoryError:
    pass
print(allowance.context, len(held), meter.used(), len(allowance.notes))
"""


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def test_a_copy_waits_for_the_compute_that_reads_its_target(device: torch.device) -> None:
    transfer = CudaTransfer(device)
    host = Arena(2, 64 * MIB, transfer)
    near = transfer.allocate(1, 64 * MIB)[0]
    host.slot(0).fill_(1)
    host.slot(1).fill_(2)
    transfer.landed(transfer.copy(host.slot(0), near))
    busy = torch.randn(4096, 4096, device=device)
    torch.mm(busy, busy).clamp_(-1, 1)
    near.max(), near.min()  # code is loaded at first use, which takes time or waits for the device
    torch.cuda.synchronize(device)
    for _ in range(100):
        busy = torch.mm(busy, busy).clamp_(-1, 1)
    first = near.max()
    ticket = transfer.copy(host.slot(1), near)
    assert not transfer.poll(ticket), "the copy overtook the compute, or the host waited for it"
    transfer.landed(ticket)
    second = near.min()
    assert (int(first), int(second)) == (1, 2)
    assert transfer.poll(ticket)
    host.unpin()


def test_a_copy_after_a_mark_runs_beside_later_compute(device: torch.device) -> None:
    transfer = CudaTransfer(device)
    host = Arena(1, 4 * MIB, transfer)
    near = transfer.allocate(1, 4 * MIB)[0]
    busy = torch.randn(8192, 8192, device=device)
    torch.mm(busy, busy)
    torch.cuda.synchronize(device)
    mark = transfer.mark()
    for _ in range(40):
        torch.mm(busy, busy)
    later = transfer.mark()
    transfer.done(transfer.copy(host.slot(0), near, mark))
    assert not transfer.poll(later), "the copy waited for compute that has nothing to do with it"
    host.unpin()


def test_the_arena_is_pinned_and_unpinned(device: torch.device) -> None:
    torch.zeros(1, device=device)
    arena = Arena(3, 2 * MIB, CudaTransfer(device))
    assert arena.notes == []
    assert arena.slot(2).is_pinned() and arena.device_address(2) > 0
    with pytest.raises(MachineError, match="CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"):
        CudaTransfer(device).register(arena.slot(0).data_ptr(), 2 * MIB)
    torch.ones(8, device=device).sum().item()  # the refusal left no error behind
    arena.unpin()
    assert not arena.slot(2).is_pinned()


def test_experts_and_tables_on_the_device_are_what_the_host_says(bench: Bench, device: torch.device) -> None:
    transfer = CudaTransfer(device)
    cache = bench.cache(transfer, ram=12, vram=10, seeds=bench.store.experts())  # type: ignore[arg-type]
    cache.fill()
    random = np.random.default_rng(0)
    for _ in range(60):
        cache.begin_token()
        torch.cuda.synchronize(device)
        table = cache.vram.address_table
        addresses, places = table.addresses.cpu(), table.places.cpu()
        for key in bench.store.experts():
            row, record = table.row(key[0]), bench.store.record(*key)
            assert int(places[row, key[1]]) == table.noted_places[row, key[1]]
            if places[row, key[1]] == VRAM:
                slot = cache.vram.slots.view(cache.vram.slot_table.slot_of[key])
                assert int(addresses[row, key[1]]) == slot.data_ptr() + record.start
                stored = slot[record.start : record.start + record.nbytes].cpu().numpy().tobytes()
                assert stored == bench.bytes[key]
        chosen = random.zipf(1.5, size=(len(bench.layers), 1, 2)) % bench.experts
        for row, layer in enumerate(bench.layers):
            missing = [e for e in set(chosen[row].ravel().tolist()) if places[row, e] == 2]
            for _ in cache.fetch(layer, missing):
                pass
        cache.end_token()
        cache.after_token(chosen)
    assert cache.counters.fetched["pcie"] > 0
    cache.close()


def test_shrinking_gives_memory_back_to_the_driver(bench: Bench, device: torch.device) -> None:
    cache = bench.cache(CudaTransfer(device), ram=4, vram=16)  # type: ignore[arg-type]
    slots = cache.vram.slots
    gc.collect()
    torch.cuda.empty_cache()  # or torch would cut the slots out of what it holds
    slots._memory = {first: slots.transfer.allocate(1, 64 * MIB) for first in slots._memory}
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    cache.shrink_vram()
    assert torch.cuda.mem_get_info(device)[0] - free >= 64 * MIB
    cache.close()


def test_the_driver_never_counts_more_than_the_budget() -> None:
    bus = driver.bus_id(0)
    if bus is None or driver.free_vram(bus) is None:
        pytest.skip("the driver's management library does not tell what is in use here")
    done = subprocess.run(
        [sys.executable, "-c", FILLS_THE_BUDGET], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
    )
    context, blocks, used, notes = map(int, done.stdout.split())
    assert notes == 0 and 50 * MIB < context < 1024 * MIB
    assert blocks > 0 and used <= 2048 * MIB


def test_a_claim_in_a_process_that_has_a_context_assumes_its_size(device: torch.device) -> None:
    torch.zeros(1, device=device)
    allowance = Allowance.claim(device, None)
    try:
        assert 0 < VramMeter(device, allowance).used() <= allowance.total
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
