"""The runtime on checkpoints with several schemes in one role: the same text as stock transformers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from offload.decode.cpu import NativeDecoder
from offload.plan.plan import make_plan
from offload.records import RunOptions, Sampling
from quant.allocation.units import Granularity
from quant.checkpoint.checkpoint import Checkpoint
from quant.checkpoint.inventory import schemes_of_tensors
from quant.convert.convert import convert
from quant.kernels.moe import READY
from quant.model.mixed_precision import MixedPrecision
from tests import oracle, sessions
from tests.machines import machine
from tests.quant.model.test_mixed_precision import mixed, shape_of

PROMPT = list(range(5, 150))
SPLITS: dict[str, dict[str, int]] = {
    "all in ram": {"ram_slots": 64, "prompt_chunk": 64},
    "three slots, the rest on disk": {"ram_slots": 3, "prompt_chunk": 64, "fills": False},
    "device window": {"ram_slots": 4, "vram_slots": 5, "prompt_chunk": 64, "fills": False},
}


@pytest.mark.parametrize(("family", "granularity"), [("llama4_text", "expert"), ("llama4_maverick", "layer")])
def test_greedy_text_equals_stock_transformers_for_every_split(
    tiny: Callable[..., Path], tmp_path: Path, family: str, granularity: Granularity
) -> None:
    source, mixture = tiny(family), mixed(shape_of(tiny(family)), granularity)
    convert(source, tmp_path / "out", mixture)
    checkpoint = Checkpoint.open(tmp_path / "out")
    stored = schemes_of_tensors(checkpoint)
    assert isinstance(stored, MixedPrecision) and stored.identity == mixture.identity
    model = oracle.stock(source, tmp_path / "out")
    with torch.inference_mode():
        expected = model.generate(
            input_ids=torch.tensor([PROMPT]), max_new_tokens=16, do_sample=False, eos_token_id=None
        )[0, len(PROMPT) :].tolist()
    for split, placed in SPLITS.items():
        options = RunOptions(context=400, exact=True)
        with sessions.session(tmp_path / "out", options, **placed) as session:
            records = list(session.generate(PROMPT, Sampling(max_tokens=16, ignore_eos=True)))
        assert [record.token_id for record in records] == expected, split


def test_experts_that_differ_by_layer_only_are_all_in_their_blocks_tables(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    convert(tiny("llama4_text"), tmp_path / "out", mixed(shape_of(tiny("llama4_text"))))
    with sessions.session(tmp_path / "out", RunOptions(context=400), **SPLITS["all in ram"]) as session:
        session.finish_filling()
        list(session.generate(PROMPT, Sampling(max_tokens=2, ignore_eos=True)))
        decoder = session.decoder
        assert isinstance(decoder, NativeDecoder)
        assert all((moe.block.table[:, -1] == READY).all() for moe in decoder.moes.values())


def test_a_plan_counts_mixed_experts_and_says_what_slots_waste(tiny: Callable[..., Path]) -> None:
    shape = shape_of(tiny("llama4_text"))
    mixture = mixed(shape)
    plan = make_plan(shape, mixture, machine(), ram=2**30)
    assert plan.slot_bytes == -(-shape.largest_expert(mixture) // 4096) * 4096
    assert any("experts differ in size" in note for note in plan.notes)
    assert plan.total("ram", "attention") == shape.role_nbytes(mixture)["attention"]
