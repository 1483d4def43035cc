"""Every key of every family's checkpoint is explained, and no other."""

from collections.abc import Callable
from pathlib import Path

import pytest

from quant.checkpoint.checkpoint import Checkpoint
from quant.errors import UnknownFamilyError
from quant.model.families import FAMILIES, LLAMA4, MIXTRAL, QWEN3_MOE, Family, Role, family_of, parse_name
from tests.checkpoints import FAMILIES as TINY

Tiny = Callable[..., Path]


@pytest.mark.parametrize("family", TINY)
def test_every_key_that_transformers_saves_has_a_role(tiny: Tiny, family: str) -> None:
    checkpoint = Checkpoint.open(tiny(family))
    assert set(checkpoint.names) == set(checkpoint.entries)
    roles = {name.role for name in checkpoint.names.values()}
    expected: set[Role] = {"experts", "attention", "lm_head", "embeddings", "router", "norm"}
    if family.startswith("llama4"):
        expected.add("shared_expert")
    if family in ("llama4_maverick", "qwen3_moe", "qwen3_moe_fused"):
        expected.add("dense_mlp")
    if family == "llama4":
        expected.add("vision")
    assert roles == expected


@pytest.mark.parametrize(
    ("family", "key", "role", "place", "suffix", "fused"),
    [
        (
            LLAMA4,
            "language_model.model.layers.7.feed_forward.experts.3.down_proj.weight_packed",
            "experts",
            (7, 3, "down_proj"),
            "weight_packed",
            "",
        ),
        (LLAMA4, "model.layers.0.feed_forward.experts.gate_up_proj", "experts", (0, None, None), "", "gate_up_proj"),
        (
            LLAMA4,
            "model.layers.1.self_attn.q_proj.weight.quant_state.bitsandbytes__nf4",
            "attention",
            (1, None, None),
            "weight.quant_state.bitsandbytes__nf4",
            "",
        ),
        (MIXTRAL, "model.layers.1.block_sparse_moe.experts.2.w3.weight", "experts", (1, 2, "up_proj"), "weight", ""),
        (QWEN3_MOE, "model.layers.4.mlp.gate.weight", "router", (4, None, None), "weight", ""),
        (QWEN3_MOE, "model.layers.4.self_attn.q_norm.weight", "norm", (4, None, None), "weight", ""),
        (QWEN3_MOE, "lm_head.weight", "lm_head", (None, None, None), "weight", ""),
    ],
)
def test_a_key_says_what_it_is(
    family: Family, key: str, role: Role, place: tuple[object, ...], suffix: str, fused: str
) -> None:
    name = parse_name(family, key)
    assert name is not None and name.role == role
    assert (name.layer, name.expert, name.projection) == place
    assert (name.suffix, name.fused) == (suffix, fused)
    assert key == f"{name.module}.{suffix}" if suffix else key == name.module


@pytest.mark.parametrize(
    "key",
    [
        "transformer.h.0.attn.weight",
        "model.layers.0.mystery",
        "bogus",
        "model.layers.0.feed_forward.experts.1.w1.weight",
        "model.layers.0.feed_forward.unknown.weight",
    ],
)
def test_a_key_of_no_family_is_not_explained(key: str) -> None:
    assert parse_name(LLAMA4, key) is None


def test_every_model_type_finds_its_family_and_others_are_refused_naming_them() -> None:
    for family in FAMILIES:
        for model_type in family.model_types:
            assert family_of(model_type) is family
    for unknown in ("gpt2", None, ""):
        with pytest.raises(UnknownFamilyError, match="expected one of llama4, llama4_text, mixtral"):
            family_of(unknown)
