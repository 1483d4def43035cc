"""The runtime on checkpoints with several schemes in one role: the same text as stock transformers."""

from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch

from offload.decode.cpu import NativeDecoder
from offload.experts.cache.expert_cache import ExpertCache
from offload.experts.storage.reader import Reader
from offload.experts.storage.store import ExpertStore
from offload.plan.planner import make_plan
from offload.records import RunOptions, Sampling
from offload.routing.eviction import LeastRecent
from quant.allocation.units import Granularity
from quant.checkpoint.checkpoint import Checkpoint
from quant.checkpoint.inventory import schemes_of_tensors
from quant.convert.convert import convert
from quant.kernels.moe import READY
from quant.model.mixed_precision import MixedPrecision
from tests import oracle, sessions
from tests.machines import RTX_4090, machine
from tests.quant.model.test_mixed_precision import mixed, shape_of

PROMPT = list(range(5, 150))
SPLITS: dict[str, dict[str, int]] = {
    "all in ram": {"ram_slots": 64, "prompt_chunk": 64},
    "three slots, the rest on disk": {"ram_slots": 3, "prompt_chunk": 64, "fills": False},
    "device window": {"ram_slots": 4, "vram_slots": 5, "prompt_chunk": 64, "fills": False},
}


@pytest.mark.parametrize(("family", "granularity"), [("llama4_text", "expert"), ("llama4_maverick", "layer")])
def test_greedy_text_equals_stock_transformers_for_every_split(
    tiny: Callable[..., Path], tmp_path: Path, family: str, granularity: Granularity
) -> None:
    source, mixture = tiny(family), mixed(shape_of(tiny(family)), granularity)
    convert(source, tmp_path / "out", mixture)
    checkpoint = Checkpoint.open(tmp_path / "out")
    stored = schemes_of_tensors(checkpoint)
    assert isinstance(stored, MixedPrecision) and stored.identity == mixture.identity
    model = oracle.stock(source, tmp_path / "out")
    with torch.inference_mode():
        expected = model.generate(
            input_ids=torch.tensor([PROMPT]), max_new_tokens=16, do_sample=False, eos_token_id=None
        )[0, len(PROMPT) :].tolist()
    for split, placed in SPLITS.items():
        options = RunOptions(context=400, exact=True)
        with sessions.session(tmp_path / "out", options, **placed) as session:
            records = list(session.generate(PROMPT, Sampling(max_tokens=16, ignore_eos=True)))
        assert [record.token_id for record in records] == expected, split


def test_experts_that_differ_by_layer_only_are_all_in_their_blocks_tables(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    convert(tiny("llama4_text"), tmp_path / "out", mixed(shape_of(tiny("llama4_text"))))
    with sessions.session(tmp_path / "out", RunOptions(context=400), **SPLITS["all in ram"]) as session:
        session.finish_filling()
        list(session.generate(PROMPT, Sampling(max_tokens=2, ignore_eos=True)))
        decoder = session.decoder
        assert isinstance(decoder, NativeDecoder)
        assert all((moe.block.table[:, -1] == READY).all() for moe in decoder.moes.values())


def test_a_plan_counts_mixed_experts_which_waste_slots_beside_a_gpu_only(tiny: Callable[..., Path]) -> None:
    shape = shape_of(tiny("llama4_text"))
    mixture = mixed(shape)
    alone, beside = (make_plan(shape, mixture, machine(gpu=gpu), ram=2**30) for gpu in (None, RTX_4090))
    for plan in (alone, beside):
        assert plan.slot_bytes == -(-shape.largest_expert(mixture) // 4096) * 4096
        assert any("experts differ in size" in note for note in plan.notes) == (plan is beside)
    assert alone.total("ram", "attention") == shape.role_nbytes(mixture)["attention"]
    assert alone.total("ram", "padding") < 4096 * alone.experts < beside.total("vram", "padding")


@pytest.mark.parametrize("part", [0.3, 0.6, 1.0])
def test_experts_of_different_size_share_memory_without_waste(
    tiny: Callable[..., Path], tmp_path: Path, part: float
) -> None:
    convert(tiny("llama4_text"), tmp_path / "out", mixed(shape_of(tiny("llama4_text")), "expert"))
    store = ExpertStore(Checkpoint.open(tmp_path / "out"))
    sizes = {key: store.record(*key).slot_bytes for key in store.experts()}
    budget = int(part * sum(sizes.values()))
    slots = budget // min(sizes.values())
    reader = Reader([entry.file for entry in store.checkpoint.entries.values()])
    cache = ExpertCache(store, reader, LeastRecent(), ram_slots=min(slots, len(sizes)), ram_bytes=budget)
    assert cache.holds_all == (part == 1.0)
    random = Random(3)
    most = 0
    for _ in range(200):
        layer = random.choice(store.shape.moe_layers)
        wanted = random.sample(range(store.shape.num_experts), random.choice((1, 1, 8)))
        if random.random() < 0.3:
            cache.prefetch([(layer, expert) for expert in wanted], set())
        for expert, weights in cache.stream(layer, wanted):
            expected = store.checkpoint.read(
                f"model.layers.{layer}.feed_forward.experts.{expert}.up_proj.weight_packed"
            )
            assert torch.equal(weights.up_proj.tensors["weight_packed"], expected)
        held = [sizes[key] for key in cache.host.slot_of]
        assert sum(held) <= budget
        most = max(most, len(held))
    cache.fill()
    cache.wait()
    assert sum(sizes[key] for key in cache.host.slot_of) <= budget
    assert most > budget // max(sizes.values())  # as many as slots for the largest would have held
    reader.close()
