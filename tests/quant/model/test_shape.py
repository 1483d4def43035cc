"""A shape, read from config.json alone, counts the tensors and bytes that the checkpoint really has."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from quant.checkpoint.checkpoint import Checkpoint
from quant.errors import CheckpointError
from quant.model.known_shapes import load_shape
from quant.model.shape import ModelShape
from quant.scheme import Scheme
from tests.checkpoints import FAMILIES, make

Tiny = Callable[..., Path]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shape_counts_every_weight_of_the_checkpoint(tiny: Tiny, family: str) -> None:
    checkpoint = Checkpoint.open(tiny(family))
    shape = checkpoint.shape
    text = (linear.weights for linear in shape.linears() if linear.role != "vision")
    counted = sum(text) + sum(t.elements for t in shape.plain_tensors())
    stored = sum(math.prod(entry.shape) for entry in checkpoint.entries.values())
    assert counted + shape.vision_weights == stored
    assert sum(shape.role_nbytes({}).values()) == 2 * stored


@pytest.mark.parametrize("family", ["llama4_text", "llama4_maverick", "llama4", "mixtral", "qwen3_moe", "olmoe"])
def test_every_tensor_it_names_has_that_shape(tiny: Tiny, family: str) -> None:
    checkpoint = Checkpoint.open(tiny(family))
    for spec in checkpoint.shape.plain_tensors():
        assert checkpoint.entry(spec.key).shape == spec.shape
    for linear in (*checkpoint.shape.dense_linears(), *checkpoint.shape.vision_linears()):
        entry = checkpoint.entry(f"{linear.module}.weight")
        assert entry.shape == (linear.out_features, linear.in_features)
        assert checkpoint.names[entry.key].role == linear.role
        assert checkpoint.names[entry.key].layer == linear.layer


def test_scouts_tower_in_int8_takes_half_of_what_it_takes_in_bf16() -> None:
    scout = ModelShape.from_config(load_shape("scout"))
    assert scout.role_nbytes({})["vision"] == 1_743_864_832
    assert scout.role_nbytes({"vision": Scheme("int8")})["vision"] == 887_790_592


def test_scout_has_109_billion_weights_and_maverick_402() -> None:
    for name, billions, moe_layers, experts in (("scout", 109, 48, 16), ("maverick", 402, 24, 128)):
        shape = ModelShape.from_config(load_shape(name))
        assert round(sum(shape.role_nbytes({}).values()) / 2e9) == billions
        assert (len(shape.moe_layers), shape.num_experts, shape.top_k) == (moe_layers, experts, 1)


def test_one_scout_expert_takes_65_megabytes_at_int4() -> None:
    shape = ModelShape.from_config(load_shape("scout"))
    assert shape.expert_nbytes(Scheme("int4")) == 64_880_640


def test_chunked_layers_hold_no_more_than_their_chunk(tiny: Tiny) -> None:
    shape = Checkpoint.open(tiny("llama4_text")).shape
    assert shape.chunked_layers == (0, 1, 2) and shape.attention_chunk_size == 32
    assert dict(shape.kv_layers(100)) == {0: 32, 1: 32, 2: 32, 3: 100}
    assert shape.kv_nbytes(100) == (3 * 32 + 100) * 2 * 2 * 32 * 2


def test_tied_embeddings_have_no_head(tmp_path: Path) -> None:
    shape = Checkpoint.open(make("llama4_text", tmp_path / "tied", tie_word_embeddings=True)).shape
    assert shape.tie_word_embeddings
    assert not [linear for linear in shape.linears() if linear.role == "lm_head"]


def test_a_missing_number_is_named(tiny: Tiny) -> None:
    config = json.loads((tiny("mixtral") / "config.json").read_text())
    del config["hidden_size"]
    with pytest.raises(CheckpointError, match="has no 'hidden_size'"):
        ModelShape.from_config(config)


@pytest.mark.parametrize("top_k", [0, 17])
def test_more_experts_per_token_than_there_are_is_refused(top_k: int) -> None:
    config = load_shape("mini-scout")
    text = config.get("text_config", config)
    text["num_experts_per_tok"] = top_k
    with pytest.raises(CheckpointError, match=f"is {top_k} of 16 experts: expected 1 to 16"):
        ModelShape.from_config(config)
