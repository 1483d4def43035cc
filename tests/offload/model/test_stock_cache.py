"""transformers' own caches forget the latest tokens exactly, or everything."""

import pytest
import torch
from transformers import CONFIG_MAPPING

from offload.model.stock_cache import StockCache
from quant.architecture.meta_model import model_class
from quant.architecture.shape import shape_of
from quant.errors import BudgetError
from tests.family_checkpoints import COMMON, FAMILIES


def _model_and_cache(kind: str) -> tuple[torch.nn.Module, StockCache]:
    config = CONFIG_MAPPING[kind](**COMMON, **{k: v for k, v in FAMILIES[kind].items() if k not in COMMON})
    torch.manual_seed(0)
    return model_class(config)(config).eval(), StockCache(shape_of(config.to_dict()), config, 64)


@pytest.mark.parametrize(("kind", "length", "kept"), [("qwen3", 6, 6), ("mistral", 6, 6), ("mistral", 20, 0)])
def test_rewinding_keeps_what_can_be_kept(kind: str, length: int, kept: int) -> None:
    model, cache = _model_and_cache(kind)
    ids = torch.arange(24)[None]
    run = length + 4
    with torch.inference_mode():
        model(input_ids=ids[:, :run], past_key_values=cache, use_cache=True)
        assert cache.nbytes > 0
        assert cache.rewind(length) == kept == cache.get_seq_length()
        again = model(input_ids=ids[:, kept:], past_key_values=cache, use_cache=True).logits[0, -1]
        fresh = model(input_ids=ids).logits[0, -1]
    assert torch.allclose(again, fresh, atol=1e-5)


def test_more_tokens_than_planned_are_refused() -> None:
    _, cache = _model_and_cache("qwen3")
    cache.check(64)
    with pytest.raises(BudgetError, match="planned for 64 tokens"):
        cache.check(65)
