"""Weights that bitsandbytes serialized are what it dequantizes itself, bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant, int8_vectorwise_quant, quantize_4bit
from torch import Tensor

from quant.errors import CheckpointError
from quant.pack import quiet_bitsandbytes
from quant.sources.open import open_source
from tests.quant.sources.foreign import Tensors, edited, foreign, rows_equal

Tiny = Callable[..., Path]
SMALL = {"num_hidden_layers": 2, "num_local_experts": 4}
EXPERT = "model.layers.1.block_sparse_moe.experts.3.w2"
CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def four_bits(
    kind: str = "nf4", block: int = 64, *, double: bool = False
) -> Callable[[Tensor], tuple[Tensors, Tensor]]:
    def store(weight: Tensor) -> tuple[Tensors, Tensor]:
        quiet_bitsandbytes()
        packed, state = quantize_4bit(weight.contiguous(), blocksize=block, quant_type=kind, compress_statistics=double)
        parts = {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}
        dense: Any = dequantize_4bit(packed, state)
        return {"weight": packed} | parts, dense

    return store


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_gives_the_same_bits_for_4(tiny: Tiny, tmp_path: Path, kind: str, double: bool) -> None:
    meant = foreign(tiny("mixtral", **SMALL), tmp_path / "bnb", four_bits(kind, double=double), CONFIG)
    rows_equal(tmp_path / "bnb", meant)


def test_a_block_may_begin_in_one_row_and_end_in_another(tiny: Tiny, tmp_path: Path) -> None:
    def store(weight: Tensor) -> tuple[Tensors, Tensor]:
        made, _ = four_bits(block=512)(weight)  # bitsandbytes' kernel for CPUs takes blocks for parts of rows
        levels, absmax = made["weight.quant_map"], made["weight.absmax"]
        return made, _dequantize_4bit_compute(made["weight"].view(-1), absmax, levels, 512, weight.shape, weight.dtype)

    rows_equal(tmp_path / "bnb", foreign(tiny("mixtral", **SMALL), tmp_path / "bnb", store, CONFIG))


def test_bitsandbytes_gives_the_same_bits_for_8(tiny: Tiny, tmp_path: Path) -> None:
    def store(weight: Tensor) -> tuple[Tensors, Tensor]:
        codes, largest, _ = int8_vectorwise_quant(weight.half())
        dense: Any = int8_vectorwise_dequant(codes, largest)
        return {"weight": codes, "SCB": largest, "weight_format": torch.zeros((), dtype=torch.uint8)}, dense

    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    rows_equal(tmp_path / "bnb", foreign(tiny("mixtral", **SMALL), tmp_path / "bnb", store, config))


def said(**more: object) -> Tensor:
    """The JSON text beside a weight, with something else in it."""
    text = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [128, 128]} | more
    return torch.frombuffer(bytearray(json.dumps(text).encode()), dtype=torch.uint8)


WEIGHT = f"{EXPERT}.weight"
ABSMAX, STATE = f"{WEIGHT}.absmax", f"{WEIGHT}.quant_state.bitsandbytes__nf4"
REFUSED: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "no scales": (lambda t: t.pop(ABSMAX), f"{WEIGHT} has no scales: expected {ABSMAX}"),
    "no levels": (lambda t: t.pop(f"{WEIGHT}.quant_map"), f"{WEIGHT} has no levels"),
    "no description": (lambda t: t.pop(STATE), f"{WEIGHT} has no description: expected {STATE}"),
    "no codes": (lambda t: t.pop(WEIGHT), f"{WEIGHT}.* is a part of a quantized weight"),
    "half of the codes": (lambda t: t.update({WEIGHT: t[WEIGHT][:99]}), rf"{WEIGHT} has shape \[99, 1\]"),
    "scales in bf16": (lambda t: t.update({ABSMAX: t[ABSMAX].bfloat16()}), f"{ABSMAX} has dtype BF16: expected F32"),
    "too few scales": (lambda t: t.update({ABSMAX: t[ABSMAX][1:]}), rf"{ABSMAX} has shape \[255\]: expected \[256\]"),
    "a block of 17": (lambda t: t.update({STATE: said(blocksize=17)}), "blocksize is 17: expected"),
    "another type": (lambda t: t.update({STATE: said(quant_type="int4")}), "quant_type is 'int4': expected"),
    "no JSON": (lambda t: t.update({STATE: said()[1:]}), "cannot be read as JSON"),
    "scales not quantized": (
        lambda t: t.update({STATE: said(nested_blocksize=256, nested_offset=0.1)}),
        f"{ABSMAX} has no levels",
    ),
    "another shape": (lambda t: t.update({STATE: said(shape=[64, 256])}), r"weight has shape \[64, 256\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_belong_together_is_refused_by_name(tiny: Tiny, tmp_path: Path, case: str) -> None:
    edit, text = REFUSED[case]
    foreign(tiny("mixtral", **SMALL), tmp_path / "source", four_bits(), CONFIG)
    with pytest.raises(CheckpointError, match=text):
        open_source(edited(tmp_path / "source", tmp_path / "model", edit))
