"""GPTQ's and AWQ's layouts are what AutoRound 0.16.1 dequantizes; `fixtures/gptq_awq.safetensors` has what its
packers made of random weights (4 and 8 bits, symmetric or not, both formats), and the weights that it computes with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quant.checkpoint.checkpoint import Checkpoint
from quant.checkpoint.headers import read_headers
from quant.errors import CheckpointError
from quant.pack import pack
from quant.sources.gptq import transposed_weights
from quant.sources.open import open_source
from quant.sources.settings import Awq, Gptq
from tests.quant.sources.foreign import Tensors, edited, foreign, rows_equal, save

Tiny = Callable[..., Path]
SMALL = {"num_hidden_layers": 2, "num_local_experts": 4}
EXPERT = "model.layers.1.block_sparse_moe.experts.3.w2"
FIXTURE = load_file(Path(__file__).parent / "fixtures" / "gptq_awq.safetensors")
CASES = sorted({key.rpartition(".")[0] for key in FIXTURE})


@pytest.mark.parametrize("case", CASES)
def test_a_fixture_is_what_its_own_library_computes_with(tiny: Tiny, tmp_path: Path, case: str) -> None:
    parts = {name: FIXTURE[f"{case}.{name}"] for name in ("qweight", "qzeros", "scales", "dense")}
    dense = parts.pop("dense")
    save(tmp_path, {f"layer.{name}": value for name, value in parts.items()})
    (tmp_path / "config.json").write_bytes((tiny("mixtral", **SMALL) / "config.json").read_bytes())
    raw = Checkpoint(*read_headers(tmp_path))
    settings: Gptq | Awq = Awq(bits=4, group_size=32)
    if case != "awq":
        version: Any = "gptq_v2" if case.startswith("v2") else "gptq"
        settings = Gptq(bits=8 if "int8" in case else 4, group_size=32, checkpoint_format=version)
    (weight,) = transposed_weights(raw, settings)
    assert torch.equal(weight.rows(0, len(dense)).half(), dense)
    assert torch.equal(weight.rows(5, 19).half(), dense[5:19])
    assert bool(weight.bits) == (".sym" in case)


def gptq(weight: Tensor, *, acts: bool = False) -> tuple[Tensors, Tensor]:
    """A weight in symmetric int4 by GPTQ's tools, groups of 32; with ``acts`` columns belong to groups out of order."""
    rows, columns = weight.shape
    group = torch.arange(columns) // 32
    if acts:
        group = group[torch.randperm(columns, generator=torch.Generator().manual_seed(1))]
    scale = torch.rand(columns // 32, rows, generator=torch.Generator().manual_seed(2)).half()
    values = torch.randint(-8, 8, (rows, columns), generator=torch.Generator().manual_seed(3)).to(torch.int8)
    stored = {
        "qweight": pack(values, 4).t(),
        "qzeros": torch.full((columns // 32, rows // 8), 0x77777777, dtype=torch.int32),
        "scales": scale,
        "g_idx": group.to(torch.int32),
    }
    return stored, values.half() * scale.t()[:, group]


CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": True}


@pytest.mark.parametrize("acts", [False, True])
def test_the_order_of_activations_says_which_group_a_column_is_of(tiny: Tiny, tmp_path: Path, acts: bool) -> None:
    meant = foreign(tiny("mixtral", **SMALL), tmp_path / "gptq", lambda weight: gptq(weight, acts=acts), CONFIG)
    rows_equal(tmp_path / "gptq", meant)


PARTS = {name: f"{EXPERT}.{name}" for name in ("qweight", "qzeros", "scales", "g_idx")}
REFUSED: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "no scales": (lambda t: t.pop(PARTS["scales"]), "qweight has no scales"),
    "no zero points": (lambda t: t.pop(PARTS["qzeros"]), "qweight has no zero points"),
    "no words": (lambda t: t.pop(PARTS["qweight"]), "is a part of a quantized weight whose other"),
    "words in F32": (
        lambda t: t.update({PARTS["qweight"]: t[PARTS["qweight"]].float()}),
        "qweight has dtype F32: expected I32",
    ),
    "half of the groups": (
        lambda t: t.update({PARTS["scales"]: t[PARTS["scales"]][:2]}),
        r"scales has shape \[2, 128\]: expected \[4, 128\]",
    ),
    "fewer zero points": (
        lambda t: t.update({PARTS["qzeros"]: t[PARTS["qzeros"]][:, :8]}),
        r"qzeros has shape \[4, 8\]: expected \[4, 16\]",
    ),
    "no order": (
        lambda t: t.pop(PARTS["g_idx"]),
        "qweight has no order of columns, which desc_act in config.json asks",
    ),
    "a short order": (lambda t: t.update({PARTS["g_idx"]: t[PARTS["g_idx"]][:8]}), r"g_idx has shape \[8\]"),
    "other bits": (
        lambda t: t.update({PARTS["qweight"]: torch.cat([t[PARTS["qweight"]]] * 2)}),
        r"qweight has shape|scales has shape|has shape \[128, 256\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_belong_together_is_refused_by_name(tiny: Tiny, tmp_path: Path, case: str) -> None:
    edit, said = REFUSED[case]
    foreign(tiny("mixtral", **SMALL), tmp_path / "source", gptq, CONFIG)
    with pytest.raises(CheckpointError, match=said) as caught:
        open_source(edited(tmp_path / "source", tmp_path / "model", edit))
    assert EXPERT in str(caught.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_method": "gptq", "bits": 3}, "weights of 3 bits by GPTQ"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "4 bits by AWQ in version gemv"),
        ({"quant_method": "gptq"}, "has no 'bits'"),
    ],
)
def test_other_layouts_are_refused_by_name(tiny: Tiny, tmp_path: Path, config: dict[str, Any], said: str) -> None:
    foreign(tiny("mixtral", **SMALL), tmp_path / "source", gptq, config)
    with pytest.raises(CheckpointError, match=said):
        open_source(tmp_path / "source")
