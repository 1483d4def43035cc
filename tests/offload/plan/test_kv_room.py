"""What a KV cache may take of RAM holds, however short the context is."""

import pytest

from offload.plan.kv_room import KvRoom
from quant.errors import BudgetError
from quant.model.shape import ModelShape

SHAPE = ModelShape.from_config(
    {
        "model_type": "mixtral",
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "vocab_size": 64,
    }
)
PAGE = 1000


@pytest.mark.parametrize("context", [128, 1024, 4096, 20_000, 100_000])
@pytest.mark.parametrize("chunk", [64, 512, 2048])
def test_pages_in_ram_are_within_the_room_or_it_is_said_what_is_needed(context: int, chunk: int) -> None:
    all_pages, rooms, refused = SHAPE.kv_pages(context), (1, 10, 100, 500, 5_000), list[int]()
    for room in rooms:
        try:
            tiers = KvRoom(room * PAGE).tiers(SHAPE, context, chunk, PAGE)
        except BudgetError:
            refused.append(room)
        else:
            assert (tiers.memory_pages if tiers.pages < all_pages else all_pages) <= room
    assert refused == [room for room in rooms if room <= max(refused)], "more room is never too little"
    assert 1 in refused and 5_000 not in refused
