"""What keeps an engine from loading a checkpoint is said, each thing once; what loads is not complained of."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from quant.architecture.shape import shape_of
from quant.checkpoint.engines import ENGINES, EngineName, obstacles
from quant.checkpoint.inventory import open_headers
from quant.scheme import Scheme
from tests.family_checkpoints import COMMON, FAMILIES

Tiny = Callable[..., Path]
INT4 = {"experts": "int4"}
ALL = {"experts": "int4", "attention": "int8", "lm_head": "int8"}
CASES: list[tuple[EngineName, str, dict[str, str], str]] = [
    ("transformers", "mixtral", ALL, ""),
    ("transformers", "llama4", {"experts": "nf4"}, ""),
    ("transformers", "mixtral", {"experts": "nf4"}, "it takes those of Llama 4 only"),
    ("vllm", "llama4", ALL, ""),
    ("vllm", "mixtral", {"experts": "int4-g64"}, ""),
    ("vllm", "mixtral", {}, ""),
    ("vllm", "mixtral", {"experts": "int4-g256"}, "groups of 256: it takes 32 or 64 or 128"),
    ("vllm", "llama4", {"experts": "nf4"}, "routed experts in nf4: it takes int4 or int8 or bf16"),
    ("vllm", "mixtral", {"attention": "int8"}, "experts in bf16 beside quantized weights are stored fused"),
    ("vllm", "llama4", {"attention": "int8"}, ""),
    ("transformers", "llama4", {**INT4, "vision": "int8-g32"}, ""),
    ("vllm", "llama4", {**INT4, "vision": "int8-g32"}, "vision tower in int8: it takes bf16"),
    ("sglang", "qwen3_moe", INT4, ""),
    ("sglang", "qwen3_moe", ALL, "attention in int8: it takes bf16"),
    ("sglang", "llama4", INT4, "answers nonsense"),
    ("sglang", "olmoe", {"experts": "int8"}, "routed experts in int8: it takes int4 or bf16"),
]


@pytest.mark.parametrize(("engine", "family", "roles", "said"), CASES)
def test_what_an_engine_cannot_load_is_said(
    tiny: Tiny, engine: EngineName, family: str, roles: dict[str, str], said: str
) -> None:
    schemes: Any = {role: Scheme.parse(text) for role, text in roles.items()}
    found = obstacles(open_headers(tiny(family)).shape, schemes, ENGINES[engine])
    assert bool(found) == bool(said)
    assert any(said in line for line in found) or not found


@pytest.mark.parametrize(("family", "said"), [("gpt_oss", "it has no place for them"), ("qwen2_moe", "")])
def test_single_experts_of_a_family_that_has_them_in_one_tensor_are_not_loaded(family: str, said: str) -> None:
    shape = shape_of({"model_type": family, **COMMON, **FAMILIES[family]})
    found = obstacles(shape, {"experts": Scheme("int4", 32)}, ENGINES["transformers"])
    assert [said in line for line in found] == ([True] if said else [])
    assert not obstacles(shape, {"attention": Scheme("int4", 32)}, ENGINES["transformers"])


def test_every_engine_is_known_by_its_name() -> None:
    assert tuple(sorted(ENGINES)) == tuple(sorted(get_args(EngineName)))
