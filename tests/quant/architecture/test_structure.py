"""The parts of a model are found by what they are, and every key of its files has a place."""

from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from quant.architecture.general_shape import GeneralShape
from quant.architecture.shape import shape_of
from quant.errors import CheckpointError, UnknownFamilyError
from quant.model.families import CPU_LAYERS
from tests.family_checkpoints import COMMON, DENSE, FAMILIES, TABLED

ROOT = Path(__file__).parents[3]


def shape(kind: str, **changed: Any) -> GeneralShape:
    made = shape_of(CONFIG_MAPPING[kind](**{**COMMON, **FAMILIES[kind], **changed}).to_dict())
    assert isinstance(made, GeneralShape)
    return made


def roles(made: GeneralShape, layer: int) -> dict[str, str]:
    parts = [(one.module, one.role) for one in made.dense_linears() if one.layer == layer]
    parts += [(one.key, one.role) for one in made.plain_tensors() if one.layer == layer]
    return {name.partition(f"layers.{layer}.")[2]: role for name, role in parts}


def test_the_parts_of_a_deepseek_layer_have_their_roles() -> None:
    made = shape("deepseek_v3")
    found = roles(made, 1)
    assert (made.moe_layers, made.num_experts, made.top_k) == ((1, 2), 8, 3)
    assert found["mlp.shared_experts.gate_proj"] == "shared_expert"
    assert found["mlp.gate.weight"] == found["mlp.gate.e_score_correction_bias"] == "router"
    assert found["self_attn.kv_a_proj_with_mqa"] == "attention"
    assert found["self_attn.kv_a_layernorm.weight"] == found["input_layernorm.weight"] == "norm"
    assert roles(made, 0)["mlp.gate_proj"] == "dense_mlp"


def test_a_shared_experts_gate_is_a_router_and_an_mlp_as_wide_as_the_experts_are_many_is_none() -> None:
    made = shape("qwen2_moe", num_experts=32, shared_expert_intermediate_size=32)
    found = roles(made, 0)
    assert found["mlp.shared_expert_gate.weight"] == found["mlp.gate.weight"] == "router"
    assert found["mlp.shared_expert.up_proj"] == "shared_expert"


def test_what_a_layer_keeps_of_a_token_is_measured() -> None:
    compressed, windows, states = shape("deepseek_v3"), shape("gpt_oss"), shape("qwen3_next")
    per_token = 128 + 16  # kv_lora_rank and the rotary part
    assert compressed.kv_nbytes(100) == 3 * 100 * per_token * 2
    assert windows.kv_nbytes(100) == 2 * (100 + 16 + 16) * 2 * 32 * 2
    grown, short = states.kv_nbytes(100), states.kv_nbytes(50)
    assert grown - short == 50 * 2 * 2 * 32 * 2 and short > 50 * 2 * 2 * 32 * 2


def test_names_lead_to_one_place_from_a_file_and_from_the_model() -> None:
    made = shape("minimax_m2")
    assert made.expert_module(1, 3, "up_proj") == "model.layers.1.block_sparse_moe.experts.3.w3"
    assert made.runtime_name("model.layers.1.block_sparse_moe.experts.3.w3") == "model.layers.1.mlp.experts.3.up_proj"
    saved, runtime = (made.place(f"model.layers.0.{block}.gate.weight") for block in ("block_sparse_moe", "mlp"))
    assert saved == runtime is not None
    assert made.place("model.layers.0.mlp.experts.gate_up_proj_scale") is None
    assert made.place("model.layers.7.mlp.gate.weight") is None


def test_layers_that_draft_tokens_are_left_out() -> None:
    made = shape("deepseek_v3", num_hidden_layers=61)
    assert made.is_ignored("model.layers.61.mlp.gate.weight")
    assert not made.is_ignored("model.layers.60.mlp.gate.weight")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "no_such_family"}, "model_type 'no_such_family' is not a family"),
        ({"model_type": "bert"}, "no causal language model|cannot be run|no list of its"),
        ({"model_type": "deepseek_v3", "num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"model_type": "qwen2_moe", "hidden_size": "wide"}, "hidden_size is 'wide'"),
        ({"model_type": "nemotron_h"}, "experts without a gate projection|not supported|cannot"),
        ({"model_type": ["qwen2_moe"]}, "is not a family"),
    ],
)
def test_what_is_not_understood_is_refused_in_one_line(config: dict[str, Any], said: str) -> None:
    with pytest.raises((CheckpointError, UnknownFamilyError), match=said) as caught:
        shape_of(config)
    assert "\n" not in str(caught.value)


def test_no_family_of_the_general_path_is_named_in_the_sources() -> None:
    sources = "".join(path.read_text() for room in ("quant", "offload", "cli") for path in (ROOT / room).rglob("*.py"))
    named = [family for family in FAMILIES if family not in DENSE and f'"{family}"' in sources]
    assert named == [family for family in named if family in (*TABLED, *CPU_LAYERS)]
