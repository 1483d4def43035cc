"""Predictions follow from bytes and bandwidths: never beyond the floor, and moved by what limits them."""

from dataclasses import replace
from typing import Any

import pytest

from offload.hardware.gpu import Gpu
from offload.hardware.probe import Machine
from offload.plan.cost_model import (
    CACHED_GB_S_PER_CORE,
    FORESEEN,
    ColdPath,
    Workload,
    decode,
    miss_split,
    prefetch_bytes,
    prefill,
    read_ahead_s,
    with_prefetch_bytes,
)
from offload.plan.footprint import Footprint
from quant.model.known_shapes import load_shape
from quant.model.recipe import load_recipe
from quant.model.shape import ModelShape
from quant.scheme import Scheme
from tests.machines import RTX_4090, machine

MINI = Footprint(ModelShape.from_config(load_shape("mini-scout")), load_recipe("mini-scout").schemes, 4096, 16)
HITS: dict[str, Any] = {"vram_hits": 0.0, "hits": 1.0, "resident": 1.0}


def load(**shares: float) -> Workload:
    return MINI.load(filled=512, **{**HITS, **shares})


def floor(load: Workload, on: Machine) -> float:
    """Seconds per token that the memory allows at best."""
    experts = load.requests * load.expert
    ram = (load.dense + load.kv + experts) / on.ram_gb_s / 1e9
    return max(ram, (1 - load.hits) * experts / on.disk_gb_s / 1e9)


@pytest.mark.parametrize("hits", [1.0, 0.9, 0.5, 0.0])
def test_decode_is_never_predicted_beyond_the_floor(hits: float) -> None:
    on = machine(ram_gb_s=20, disk_gb_s=1)
    seconds = 1 / decode(load(hits=hits), on).tokens_per_s
    assert 1 <= seconds / floor(load(hits=hits), on) < 2.2


def test_the_limit_is_what_faster_hardware_helps() -> None:
    in_ram, from_disk = load(), load(hits=0.4, resident=0.4)
    slow = machine(ram_gb_s=20, disk_gb_s=1)
    assert decode(in_ram, slow).limited_by == "ram bandwidth"
    assert decode(in_ram, replace(slow, ram_gb_s=40)).tokens_per_s > 1.8 * decode(in_ram, slow).tokens_per_s
    assert decode(in_ram, replace(slow, disk_gb_s=9)) == decode(in_ram, slow)
    assert decode(from_disk, slow).limited_by == "disk"
    assert decode(from_disk, replace(slow, disk_gb_s=1.5)).tokens_per_s > 1.3 * decode(from_disk, slow).tokens_per_s


def test_cpu_and_pcie_at_once_beat_either() -> None:
    on = machine(gpu=replace(RTX_4090, together_gb_s=90))  # the CPU alone does not take all there is
    paths: tuple[ColdPath, ...] = ("split", "cpu", "pcie")
    split, cpu, pcie = (decode(load(vram_hits=0.3), on, path) for path in paths)
    assert split.tokens_per_s > cpu.tokens_per_s > pcie.tokens_per_s
    assert (cpu.cpu_share, pcie.cpu_share) == (1.0, 0.0) and split.cpu_share is not None and 0 < split.cpu_share < 1
    assert pcie.limited_by == "pcie"


def test_cpu_and_pcie_together_get_no_more_than_the_memory_has() -> None:
    # PCIe 5 beside one slow channel of memory: both read the same DIMMs.
    fast_bus = replace(RTX_4090, h2d_gb_s=50)
    on = machine(gpu=fast_bus, ram_gb_s=30)
    cold = load(vram_hits=0.0)
    seconds = sum(decode(cold, on).seconds[name] for name in ("ram bandwidth",))
    assert seconds >= cold.requests * cold.expert / 30e9


def test_hits_in_vram_are_worth_what_the_card_reads_faster() -> None:
    speeds = [decode(load(vram_hits=share), machine(gpu=RTX_4090)).tokens_per_s for share in (0, 0.5, 1)]
    assert speeds == sorted(speeds) and speeds[2] > 2.5 * speeds[0]


def test_what_the_cpu_has_in_its_caches_is_saved_up_to_their_size_and_the_idle_time() -> None:
    scout = Footprint(ModelShape.from_config(load_shape("scout")), load_recipe("fast").schemes, 4096, 8)

    def seconds(cache: int, **shares: float) -> float:
        asked = scout.load(filled=512, **{**HITS, **shares})
        return 1 / decode(asked, replace(machine(gpu=RTX_4090), cache_bytes=cache)).tokens_per_s

    cached = CACHED_GB_S_PER_CORE * 8e9
    split = miss_split(machine(gpu=RTX_4090), scout.expert_bytes, scout.shape.expert_weights)
    saved = 47 * FORESEEN * 2**22 * (1 / split.cpu_gb_s / 1e9 - 1 / cached)  # all layers but the first
    assert seconds(0) - seconds(2**23) == pytest.approx(saved)
    assert seconds(2**28) == seconds(2**30) > 0.9 * seconds(0)  # idle time runs out
    assert seconds(2**26, vram_hits=1.0) == seconds(0, vram_hits=1.0)
    assert seconds(2**26, vram_hits=0.3, hits=0.3) == seconds(0, vram_hits=0.3, hits=0.3)  # all from disk
    splits = replace(machine(gpu=replace(RTX_4090, together_gb_s=85)), cache_bytes=2**26)
    asked = scout.load(filled=512, **HITS)
    ahead = read_ahead_s(asked, splits)
    parts = [miss_split(splits, asked.expert, asked.expert_weights, asked.shared, s) for s in (0.0, ahead)]
    assert 0 < parts[1].gpu_part < parts[0].gpu_part  # the CPU, which has a part in cache, takes more
    assert decode(asked, splits).tokens_per_s > decode(asked, replace(splits, cache_bytes=0)).tokens_per_s
    assert prefetch_bytes(with_prefetch_bytes(machine(), 2**20)) == 2**20


def test_prefill_reads_an_expert_once_per_chunk_so_larger_chunks_are_faster_from_disk() -> None:
    on = machine(disk_gb_s=1)
    rates = [prefill(load(hits=0.5, resident=0.5), on, 2048, chunk).tokens_per_s for chunk in (128, 512, 2048)]
    assert rates == sorted(rates) and rates[2] > 4 * rates[0]


def test_prefill_in_ram_is_bound_by_arithmetic_and_a_single_token_by_memory() -> None:
    on = machine(ram_gb_s=20)
    assert prefill(load(), on, 512, 512).limited_by == "compute"
    assert prefill(load(), on, 1, 512).limited_by == "ram bandwidth"


def test_prefill_beside_a_gpu_waits_for_pcie_unless_experts_are_in_vram() -> None:
    def limit(share: float, gpu: Gpu) -> str:
        return prefill(load(vram_hits=share), machine(gpu=gpu), 512, 512).limited_by

    assert limit(0.0, RTX_4090) == "pcie"
    assert limit(1.0, RTX_4090) != "pcie"


def test_nf4_on_a_cpu_is_slow_and_says_so() -> None:
    nf4 = replace(MINI, schemes={**MINI.schemes, "experts": Scheme("nf4")}, slot_bytes=0)
    slow = decode(nf4.load(filled=512, **HITS), machine())
    assert slow.tokens_per_s < decode(load(), machine()).tokens_per_s / 5
