"""The KV cache keeps what attention may see, and no more."""

import pytest
import torch

from offload.model.kv_cache import KVLayer, remedy
from quant.errors import BudgetError


def _states(start: int, count: int) -> torch.Tensor:
    positions = torch.arange(start, start + count, dtype=torch.float32)
    return positions[None, None, :, None].expand(1, 2, count, 4) + torch.arange(2.0)[None, :, None, None] / 10


@pytest.mark.parametrize("steps", [[1] * 21, [5, 1, 1, 9, 5], [8, 8, 5], [21], [7, 1, 1, 12]])
def test_a_chunked_layer_gives_every_key_of_each_new_tokens_chunk(steps: list[int]) -> None:
    chunk, layer, seen = 8, KVLayer(64, 8, "plain"), 0
    for count in steps:
        length, offset = layer.get_mask_sizes(count)
        keys, values = layer.update(_states(seen, count), -_states(seen, count))
        assert torch.equal(keys, _states(offset, length)) and torch.equal(values, -keys)
        assert offset <= seen // chunk * chunk  # the first new token's chunk is all there
        seen += count
    assert layer.get_seq_length() == seen
    assert layer.key_buffer.nbytes == 2 * chunk * 4 * 4


def test_a_full_layer_keeps_everything_and_refuses_more_than_planned() -> None:
    layer = KVLayer(10, 0, "plain")
    layer.update(_states(0, 6), _states(0, 6))
    keys, _ = layer.update(_states(6, 4), _states(6, 4))
    assert torch.equal(keys, _states(0, 10))
    with pytest.raises(BudgetError, match="planned for 10 tokens"):
        layer.update(_states(10, 1), _states(10, 1))


@pytest.mark.parametrize(
    ("limit", "needed", "found"),
    [
        (0, 90, "start again with --context 200"),
        (128, 90, "start again with --context 128"),
        (512, 90, "start again with --context 200"),
        (64, 90, "the model was made for no more than 64: shorten the text"),
    ],
)
def test_no_context_is_suggested_that_the_model_was_not_made_for(limit: int, needed: int, found: str) -> None:
    assert remedy(limit, needed, 200) == found


def test_rewinding_keeps_the_prefix_unless_its_chunk_is_gone() -> None:
    layer = KVLayer(64, 8, "plain")
    layer.update(_states(0, 13), _states(0, 13))
    assert not layer.rewind(5)
    assert layer.rewind(10)
    keys, _ = layer.update(_states(10, 2), _states(10, 2))
    assert torch.equal(keys, _states(8, 4))


def test_int8_storage_is_within_half_a_step_of_each_tokens_largest_value() -> None:
    torch.manual_seed(0)
    states = torch.randn(1, 2, 30, 16) * torch.logspace(-3, 3, 30)[None, None, :, None]
    layer = KVLayer(64, 0, "int8")
    keys, _ = layer.update(states, states)
    step = states.abs().amax(-1, keepdim=True) / 127
    assert ((keys - states).abs() <= step * 0.5001).all()
    assert layer.key_buffer.nbytes == 2 * 64 * (16 + 4)
