"""Routers of transformers are told by what they do, and the native choice is theirs."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from offload.model.router import Router, router_of
from quant.architecture.meta_model import model_class
from quant.errors import CheckpointError, SchemeError
from quant.kernels.lookahead import FROM_OUTPUT, Lookahead
from quant.kernels.moe import MoeBlock
from quant.kernels.routing import Selection
from quant.kernels.weight import Weight
from tests.family_checkpoints import COMMON, FAMILIES

GROUPS = {"n_group": 4, "topk_group": 2}
EXPECTED: dict[str, tuple[dict[str, Any], Selection]] = {
    "glm4_moe": ({"routed_scaling_factor": 1.5}, Selection("sigmoid_normalized", scale=1.5)),
    "dots1": ({"norm_topk_prob": False, **GROUPS}, Selection("sigmoid", 4, 2, 2)),
    "deepseek_v3": ({"num_experts_per_tok": 4}, Selection("sigmoid_normalized", 4, 2, 2, 2.5)),
    "deepseek_v2": ({}, Selection("softmax", 4, 2, 1, 1.5)),
    "minimax_m2": ({}, Selection("sigmoid_normalized")),
    "ernie4_5_moe": ({"moe_norm_min": 0.4}, Selection("softmax_normalized", floor=0.4)),
    "hunyuan_v1_moe": ({}, Selection("softmax_normalized")),
    "qwen2_moe": ({}, Selection("softmax")),
    "gpt_oss": ({}, Selection("softmax_normalized")),
}


def stock_block(family: str, given: dict[str, Any]) -> Any:
    config = CONFIG_MAPPING[family](**{**COMMON, **FAMILIES[family], "num_hidden_layers": 3, **given})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        block = model_class(config)(config).eval().model.layers[2].mlp
        for name, values in (*block.named_parameters(), *block.named_buffers()):
            if "experts" not in name or name.endswith("correction_bias"):
                values.data.normal_(0.0, 0.3)
    return block


def stock_choice(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Experts that the stock router chooses, ascending, and their weights."""
    router = block.router if hasattr(block, "router") else block.gate
    with torch.inference_mode():
        given = (x, block.e_score_correction_bias) if hasattr(block, "e_score_correction_bias") else (x,)
        _, weights, chosen = router(*given)
    order = chosen.argsort(-1)
    return chosen.gather(1, order), weights.gather(1, order)


def native(router: Router, **changed: Any) -> MoeBlock:
    selection = replace(router.selection, **changed)
    weight = Weight.from_tensors("f32", router.weight)
    return MoeBlock(weight, router.top_k, selection, router_bias=router.bias, correction=router.correction)


@pytest.mark.parametrize("family", EXPECTED)
def test_the_native_choice_is_that_of_the_stock_router(family: str) -> None:
    given, expected = EXPECTED[family]
    block = stock_block(family, given)
    router = router_of(block)
    assert router.selection == expected
    x = torch.randn(200, 128, generator=torch.Generator().manual_seed(1)) * 2
    found = native(router).run(x, exact=True)
    order = found.chosen.long().argsort(-1)
    chosen, weights = stock_choice(block, x)
    assert torch.equal(found.chosen.long().gather(1, order), chosen)
    torch.testing.assert_close(found.weights.gather(1, order), weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3", "deepseek_v2", "ernie4_5_moe"])
def test_guesses_from_a_state_that_stays_are_what_the_router_then_chooses(family: str) -> None:
    routers = [router_of(stock_block(family, EXPECTED[family][0])) for _ in range(2)]
    norm = torch.rand(128) + 0.5
    corrections = [router.correction for router in routers if router.correction is not None]
    selection, weights = routers[0].selection, [router.weight for router in routers]
    lookahead = Lookahead(weights, [norm] * 2, routers[0].top_k, corrections=corrections, selection=selection)
    x = torch.randn(60, 128, generator=torch.Generator().manual_seed(2)) * 30
    normed = torch.nn.functional.rms_norm(x, (128,), norm)
    chosen = native(routers[1]).run(normed, exact=True).chosen
    for row in range(60):
        guessed = [expert for _, expert in lookahead.guess(FROM_OUTPUT, 0, x[row : row + 1])]
        assert sorted(guessed) == sorted(chosen[row].tolist())
    wanted = chosen.flatten().long().bincount(minlength=8)
    for_prompt = [expert for _, expert in lookahead.for_prompt(0, x)]
    assert [int(wanted[expert]) for expert in for_prompt] == sorted(wanted[wanted > 0].tolist(), reverse=True)


def test_a_router_of_another_form_is_refused_by_its_name() -> None:
    class CosineRouter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.top_k, self.weight = 2, nn.Parameter(torch.ones(8, 16))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits = nn.functional.normalize(x) @ nn.functional.normalize(self.weight).T
            weights, chosen = logits.topk(self.top_k)
            return logits, weights.square(), chosen

    block = nn.Module()
    block.gate = CosineRouter()
    with pytest.raises(CheckpointError, match="CosineRouter routes by none of the forms"):
        router_of(block)


def test_numbers_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(SchemeError, match="3 of 2 groups"):
        Selection("sigmoid", 2, 3)
    weight = Weight.from_tensors("f32", torch.ones(8, 32))
    with pytest.raises(SchemeError, match="8 experts in 3 groups"):
        MoeBlock(weight, 2, Selection("softmax", 3, 2))
    with pytest.raises(SchemeError, match="router bias"):
        MoeBlock(weight, 2, "softmax", correction=torch.ones(7))
