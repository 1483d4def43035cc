"""Loading: weights keep their stored form, and go where the plan puts them."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from offload.model.load import _move, text_config
from quant.checkpoint.checkpoint import Checkpoint


def test_embeddings_stay_on_the_host_and_all_else_moves(tiny: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("llama4_text"))
    _move(model, torch.device("meta"))  # a device that is not the host, wherever this runs
    places = {name: tensor.device.type for name, tensor in model.named_parameters()}
    assert {name for name, place in places.items() if place == "cpu"} == {"model.embed_tokens.weight"}
    assert all(buffer.device.type == "meta" for buffer in model.buffers())


def test_what_public_configs_get_wrong_is_put_right(tiny: Callable[..., Path]) -> None:
    checkpoint = Checkpoint.open(tiny("llama4_text"))
    checkpoint.config.update(attn_temperature_tuning=4, attention_chunk_size=None)
    config = text_config(checkpoint)
    assert config.attn_temperature_tuning is True
    assert isinstance(config.attention_chunk_size, int)
    assert set(config.layer_types) == {"full_attention"}
