"""What a plan counts is what the runtime allocates."""

import pytest
import torch

from offload.model.kv_cache import KVCache, Storage
from offload.model.page_pool import PagePool
from offload.plan.footprint import Footprint
from quant.model.known_shapes import load_shape
from quant.model.recipe import load_recipe
from quant.model.shape import ModelShape
from quant.scheme import Scheme

MINI = ModelShape.from_config({**load_shape("mini-scout"), "attention_chunk_size": 256})


@pytest.mark.parametrize(("bits", "storage"), [(8, "int8"), (16, "bf16"), (32, "plain")])
@pytest.mark.parametrize("context", [100, 256, 1000])
def test_the_kv_cache_takes_the_bytes_that_were_planned(context: int, bits: int, storage: Storage) -> None:
    planned = Footprint(MINI, {}, context, bits).kv_cache
    pool = PagePool(MINI, context, storage, torch.device("cpu"), torch.float32)
    assert pool.pages.nbytes == pool.nbytes == planned
    whole = KVCache(MINI, context, storage)
    states = torch.zeros(1, MINI.num_kv_heads, 1, MINI.head_dim)
    for layer in range(MINI.num_layers):
        whole.update(states, states, layer)
    assert planned * context / (context + 127) <= whole.nbytes <= planned


def test_a_slot_is_whole_pages_and_holds_an_expert() -> None:
    made = Footprint(MINI, load_recipe("mini-scout").schemes, 1, 16)
    assert made.slot_bytes % 4096 == 0 and made.expert_bytes <= made.slot_bytes < made.expert_bytes + 4096
    assert Footprint(MINI, {}, 1, 16, slot_bytes=12288).slot_bytes == 12288


def test_scratch_grows_with_the_chunk_and_with_the_context_only_where_masks_do() -> None:
    short, long = Footprint(MINI, {}, 512, 16), Footprint(MINI, {}, 131072, 16)
    assert short.scratch(16, on_gpu=False) < short.scratch(512, on_gpu=False) == long.scratch(512, on_gpu=False)
    assert short.scratch(512, on_gpu=True) < short.scratch(512, on_gpu=False)
    assert short.scratch(512, on_gpu=True) < long.scratch(512, on_gpu=True)
    dequantized = [Footprint(MINI, {"experts": Scheme("nf4")}, context, 16) for context in (512, 131072)]
    assert dequantized[0].scratch(512, on_gpu=False) < dequantized[1].scratch(512, on_gpu=False)
