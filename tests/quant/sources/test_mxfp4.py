"""MXFP4 experts are what transformers makes of gpt-oss's tensors, bit for bit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from quant.errors import CheckpointError
from quant.sources.open import open_source
from tests.quant.sources.foreign import Tensors, edited, foreign, rows_equal, save, tensors_of

Tiny = Callable[..., Path]
EXPERTS = "model.layers.0.feed_forward.experts."
UP = f"{EXPERTS}gate_up_proj"


@pytest.fixture(scope="module")
def mxfp4(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensors]:
    """Llama 4's experts, which are fused and transposed like those of gpt-oss, in random codes."""
    folder, meant = tmp_path_factory.mktemp("mxfp4") / "model", {}
    foreign(tiny("llama4_text", num_hidden_layers=2), folder, lambda weight: ({}, weight), {"quant_method": "mxfp4"})
    tensors = tensors_of(tiny("llama4_text", num_hidden_layers=2))
    random = torch.Generator().manual_seed(0)
    for key in [key for key in tensors if key.endswith(("gate_up_proj", "experts.down_proj"))]:
        count, columns, rows = tensors.pop(key).shape
        shape = (count, rows, columns // 32, 16)
        blocks = torch.randint(256, shape, dtype=torch.uint8, generator=random)
        scales = torch.randint(100, 140, shape[:3], dtype=torch.uint8, generator=random)
        tensors |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
        meant[key] = convert_moe_packed_tensors(blocks, scales)
    save(folder, tensors)
    return folder, meant


def test_transformers_gives_the_same_bits(mxfp4: tuple[Path, Tensors]) -> None:
    rows_equal(*mxfp4)


def test_rows_may_be_of_two_experts(mxfp4: tuple[Path, Tensors]) -> None:
    folder = mxfp4[0]
    whole = open_source(folder).read(UP)
    _, columns, rows = whole.shape
    part = open_source(folder).read(UP, (columns - 3) * rows * 4, (9, rows))
    assert torch.equal(part, whole.view(-1, rows)[columns - 3 : columns + 6])


def test_a_scale_that_is_no_number_is_not_taken_for_one(mxfp4: tuple[Path, Tensors], tmp_path: Path) -> None:
    folder = edited(mxfp4[0], tmp_path / "model", lambda t: t[f"{UP}_scales"].fill_(255))
    assert open_source(folder).read(UP).isnan().all()


REFUSED: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "no scales": (lambda t: t.pop(f"{UP}_scales"), f"{UP}_blocks has no scales"),
    "no blocks": (lambda t: t.pop(f"{UP}_blocks"), f"{UP}_scales is a part of a quantized weight"),
    "scales in F32": (lambda t: t.update({f"{UP}_scales": t[f"{UP}_scales"].float()}), "has dtype F32: expected U8"),
    "too few scales": (lambda t: t.update({f"{UP}_scales": t[f"{UP}_scales"][1:]}), f"{UP}_scales has shape"),
    "codes in I8": (lambda t: t.update({f"{UP}_blocks": t[f"{UP}_blocks"].to(torch.int8)}), "expected U8"),
    "another block": (lambda t: t.update({f"{UP}_blocks": t[f"{UP}_blocks"][..., :8]}), "expected U8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_belong_together_is_refused_by_name(
    mxfp4: tuple[Path, Tensors], tmp_path: Path, case: str
) -> None:
    edit, said = REFUSED[case]
    with pytest.raises(CheckpointError, match=said):
        open_source(edited(mxfp4[0], tmp_path / "model", edit))
