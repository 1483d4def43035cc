"""A prompt's sums over several experts are the same to the bit whatever was resident when it came."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from offload.records import RunOptions
from quant.convert.convert import convert
from quant.scheme import Scheme
from tests import sessions

PROMPT = [(i * 37 + 11) % 90 + 3 for i in range(50)]


@pytest.mark.parametrize("slots", [2, 3, 5, 9])
@pytest.mark.parametrize("family", ["olmoe_fused", "mixtral_fused", "qwen3_moe_fused"])
def test_a_prompt_is_the_same_to_the_bit_whatever_was_resident(
    family: str, slots: int, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    convert(tiny(family), tmp_path / "made", {"experts": Scheme("int4", 32)})
    options, draw = RunOptions(context=128), random.Random(slots)
    with sessions.session(tmp_path / "made", options, ram_slots=64) as everything:
        everything.finish_filling()
        expected = sessions.prompt_logits(everything, PROMPT)
    with sessions.session(tmp_path / "made", options, ram_slots=slots, fills=False) as session:
        shape = session.decoder.shape
        assert shape.top_k > 1, "otherwise there is nothing to add up"
        for _ in range(12):
            for layer in shape.moe_layers:
                for _ in session.experts.stream(layer, draw.sample(range(shape.num_experts), 2)):
                    pass
            assert torch.equal(sessions.prompt_logits(session, PROMPT), expected)
