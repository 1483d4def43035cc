"""A config.json is planned with, or refused in one line: whatever stands in it, and at once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from quant.errors import CheckpointError, ColdstreamError
from quant.model.config import language_config, quantization_of, read_config
from quant.model.known_shapes import load_shape
from quant.model.shape import ModelShape
from tests import hostile

Tiny = Callable[..., Path]
FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "llama4_text", "llama4")
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")
FEW: dict[str, Any] = {  # what no family can do without
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "intermediate_size": 64,
    "vocab_size": 99,
}


def counted(config: dict[str, Any]) -> bool:
    """Whether ``config`` has a shape whose every tensor is counted; False if it is refused in one line."""
    said = hostile.refusal(lambda: ModelShape.from_config(config).role_nbytes({}))
    assert len(said) < 400
    return not said


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_may_be_anything(tiny: Tiny, family: str) -> None:
    config = json.loads((tiny(family) / "config.json").read_text())
    assert counted(config)
    assert {counted(made) for _, made in hostile.changed(config)} == {True, False}
    for place, made in hostile.changed(config, lambda place: place[-1] in SIZES and place[0] != "vision_config"):
        size = hostile.at(made, place) if place[-1] in hostile.at(made, place[:-1]) else None
        if type(size) is not int or not 0 < size < 2**31:
            assert not counted(made), place


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=2000)
@given(data=st.data())
def test_several_keys_may_be_anything(tiny: Tiny, data: st.DataObject) -> None:
    config = json.loads((tiny(data.draw(st.sampled_from(FAMILIES))) / "config.json").read_text())
    counted(data.draw(hostile.mutations(config)))


@pytest.mark.parametrize("family", FAMILIES[:4])
def test_absent_keys_are_what_transformers_takes_them_for(family: str) -> None:
    few = {"model_type": family, **FEW}
    record, stock, shape = language_config(few)[1], AutoConfig.for_model(**few), ModelShape.from_config(few)
    elsewhere = ("rope_parameters", "bos_token_id", "eos_token_id")  # stock derives the first and gives the others ids
    for name, field in type(record).model_fields.items():
        found, expected = getattr(record, name), getattr(stock, name, field.default)
        assert found is None or name in elsewhere or name == "sliding_window" or found == expected, name
    assert shape.num_kv_heads == stock.num_key_value_heads
    assert shape.head_dim == (getattr(stock, "head_dim", None) or 256 // 8)
    if isinstance(found := getattr(stock, "moe_layers", None), list):
        assert list(shape.moe_layers) == found
        assert list(shape.chunked_layers) == [i for i, k in enumerate(stock.layer_types) if k == "chunked_attention"]


@pytest.mark.parametrize("family", FAMILIES[:4])
def test_every_key_that_transformers_has_for_a_family_is_in_its_record(family: str) -> None:
    """A key that a later transformers reads would otherwise be dropped on the way to it."""
    unused = {"initializer_range", "attention_dropout", "use_cache", "pad_token_id"}  # at inference
    unused |= {"output_router_logits", "router_aux_loss_coef", "router_jitter_noise"}
    stock = type(AutoConfig.for_model(family))
    keys = set(vars(stock)["__dataclass_fields__"]) - set(stock.__mro__[1].__dict__["__dataclass_fields__"])
    record = type(language_config({"model_type": family, **FEW})[1])
    assert keys - unused <= set(record.model_fields)


def test_a_dense_model_is_called_one() -> None:
    guard = load_shape("scout")  # as Llama Guard 4 has it
    guard["text_config"] |= {"moe_layers": [], "interleave_moe_layer_step": 0, "attention_chunk_size": None}
    guard["text_config"] |= {"num_local_experts": 0, "num_experts_per_tok": 0}
    with pytest.raises(CheckpointError, match=r"a dense llama4 model.* not supported yet"):
        ModelShape.from_config(guard)
    with pytest.raises(CheckpointError, match="a dense mixtral model"):
        ModelShape.from_config({"model_type": "mixtral", **FEW, "num_local_experts": 0})


def test_experts_by_the_thousand_million_are_refused_before_they_are_counted() -> None:
    config = {"model_type": "mixtral", **FEW, "num_hidden_layers": 1000}
    for experts, said in ((10**9, "num_local_experts is 1000000000"), (2**14, "expected at most 131,072 experts")):
        with pytest.raises(CheckpointError, match=said):
            ModelShape.from_config(config | {"num_local_experts": experts})


def test_a_number_of_experts_under_two_names_is_one() -> None:
    config = {"model_type": "qwen3_moe", **FEW}
    assert ModelShape.from_config(config | {"num_local_experts": 16}).num_experts == 16
    assert ModelShape.from_config(config | {"num_local_experts": 16, "num_experts": 16}).num_experts == 16
    with pytest.raises(CheckpointError, match="expected the same number"):
        ModelShape.from_config(config | {"num_local_experts": 16, "num_experts": 8})


def test_no_quantization_is_null_too() -> None:
    assert quantization_of({"quantization_config": None}) is None
    assert quantization_of({"model_type": "llama4", "text_config": {"quantization_config": {}}}) == {}


def test_a_directory_that_is_no_model_is_called_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to("../../blobs/77")
    with pytest.raises(CheckpointError, match=r"is a link to ../../blobs/77, which is not there"):
        read_config(tmp_path)


def test_a_refusal_is_one_of_ours() -> None:
    with pytest.raises(ColdstreamError):
        ModelShape.from_config({})
