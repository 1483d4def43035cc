"""fp8 weights are what compressed-tensors and transformers make of them, and quantize as their dense twin does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

from quant.convert.convert import convert
from quant.errors import CheckpointError
from quant.scheme import Scheme
from quant.sources.open import open_source
from tests.quant.dequantized import packed_weights
from tests.quant.sources.foreign import Tensors, edited, foreign, rows_equal, save, tensors_of

Tiny = Callable[..., Path]
SMALL = {"num_hidden_layers": 2, "num_local_experts": 4}
EXPERT = "model.layers.1.block_sparse_moe.experts.3.w2"


def compressed(strategy: str, **more: Any) -> tuple[Any, dict[str, Any]]:
    """How compressed-tensors stores a weight in fp8 by ``strategy``, and the config for it."""
    args = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy=strategy, **more)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format="float-quantized")
    compressor: Any = BaseCompressor.get_value_from_registry("float-quantized")

    def store(weight: Tensor) -> tuple[Tensors, Tensor]:
        rows, columns = weight.shape
        if strategy == "block":
            height, width = more["block_structure"]
            cut = weight.float().view(rows // height, height, columns // width, width)
            low, high = cut.amin((1, 3)), cut.amax((1, 3))
        else:
            dims = (1,) if strategy == "channel" else (0, 1)
            low, high = (getattr(weight.float(), name)(dims, keepdim=True) for name in ("amin", "amax"))
        scale, _ = calculate_qparams(low, high, args)
        made = compressor.compress({"weight": weight, "weight_scale": scale.to(weight.dtype)}, scheme)
        made = {name: value.view(1) if value.numel() == 1 else value for name, value in made.items()}
        return made, compressor.decompress(dict(made), scheme)["weight"]

    return store, {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": args.model_dump(mode="json"),
                "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
            }
        },
        "ignore": ["re:.*router"],
    }


def deepseek(weight: Tensor) -> tuple[Tensors, Tensor]:
    """DeepSeek's own definition: blocks of 128x128, the last of a row or column cut short; f32 scales."""
    rows, columns = weight.shape
    padded = torch.zeros(-(-rows // 96) * 96, -(-columns // 128) * 128)
    padded[:rows, :columns] = weight.float()
    cut = padded.view(padded.shape[0] // 96, 96, -1, 128)
    scale = cut.abs().amax((1, 3), keepdim=True) / 448
    codes = (cut / scale).to(torch.float8_e4m3fn)
    dense = (codes.float() * scale).view_as(padded)[:rows, :columns]
    stored = codes.view(padded.shape)[:rows, :columns]
    return {"weight": stored, "weight_scale_inv": scale[:, 0, :, 0]}, dense


@pytest.mark.parametrize(
    ("strategy", "form"),
    [("tensor", "a scale per tensor"), ("channel", "a scale per channel"), ("block", "blocks of 64x32")],
)
@pytest.mark.parametrize("family", ["mixtral", "llama4"])
def test_compressed_tensors_gives_the_same_bits(
    tiny: Tiny, tmp_path: Path, family: str, strategy: str, form: str
) -> None:
    store, config = compressed(strategy, **({"block_structure": [64, 32]} if strategy == "block" else {}))
    meant = foreign(tiny(family, num_hidden_layers=2), tmp_path / "fp8", store, config)
    rows_equal(tmp_path / "fp8", meant)
    assert open_source(tmp_path / "fp8").forms == f"{len(meant)} weights in fp8, {form}"  # type: ignore[attr-defined]


def test_blocks_as_deepseek_defines_them_may_be_cut_short(tiny: Tiny, tmp_path: Path) -> None:
    config = {"quant_method": "fp8", "weight_block_size": [96, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}
    meant = foreign(tiny("qwen3_moe", num_hidden_layers=2), tmp_path / "fp8", deepseek, config)
    rows_equal(tmp_path / "fp8", meant)


def test_blocks_are_what_transformers_makes_of_them(tiny: Tiny, tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    def store(weight: Tensor) -> tuple[Tensors, Tensor]:
        rows, columns = weight.shape
        scale = torch.rand(rows // 64, columns // 64) + 0.01
        stored = weight.to(torch.float8_e4m3fn)
        theirs: Any = Fp8Dequantize(None)
        return {"weight": stored, "weight_scale_inv": scale}, theirs._dequantize_one(stored, scale, torch.bfloat16)

    config = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    rows_equal(tmp_path / "fp8", foreign(tiny("olmoe", num_hidden_layers=2), tmp_path / "fp8", store, config))


@pytest.mark.parametrize("keep", [0, 1])
def test_blocks_have_all_their_scales(tiny: Tiny, tmp_path: Path, keep: int) -> None:
    foreign(
        tiny("mixtral", **SMALL), tmp_path / "fp8", deepseek, {"quant_method": "fp8", "weight_block_size": [96, 128]}
    )
    scale = f"{EXPERT}.weight_scale_inv"
    for name, cut in (("fewer", slice(keep, keep + 1)), ("flat", keep)):
        with pytest.raises(CheckpointError, match=rf"{scale} has shape \[1.*\]: expected \[2, 1\]"):
            open_source(edited(tmp_path / "fp8", tmp_path / name, lambda t, cut=cut: t.update({scale: t[scale][cut]})))


def test_a_scale_for_each_row_as_fbgemm_has_it(tiny: Tiny, tmp_path: Path) -> None:
    def store(weight: Tensor) -> tuple[Tensors, Tensor]:
        scale = weight.float().abs().amax(1, keepdim=True) / 448
        stored = (weight.float() / scale).to(torch.float8_e4m3fn)
        return {"weight": stored, "weight_scale": scale}, stored.float() * scale

    meant = foreign(
        tiny("llama4_maverick", num_hidden_layers=2), tmp_path / "fp8", store, {"quant_method": "fbgemm_fp8"}
    )
    rows_equal(tmp_path / "fp8", meant)


def test_fused_experts_have_scales_of_their_own(tiny: Tiny, tmp_path: Path) -> None:
    source = tmp_path / "fp8"
    meant = foreign(
        tiny("llama4_text", num_hidden_layers=2), source, compressed("channel")[0], compressed("channel")[1]
    )
    tensors, fused = tensors_of(source), "model.layers.0.feed_forward.experts."
    found = open_source(source)
    assert found.shape.family.fused_transposed and f"{fused}gate_up_proj" in tensors
    for name in ("gate_up_proj", "down_proj"):  # [E, K, N]: scales for each column
        weight = tensors[fused + name].float()
        scale = weight.abs().amax(1, keepdim=True) / 448
        tensors[fused + name] = (weight / scale).to(torch.float8_e4m3fn)
        tensors[f"{fused}{name}_scale"] = scale.bfloat16()
        meant[fused + name] = tensors[fused + name].float() * scale.bfloat16().float()
    save(source, tensors)
    rows_equal(source, meant)


def test_a_conversion_rounds_what_the_codes_stand_for(tiny: Tiny, tmp_path: Path) -> None:
    store, config = compressed("channel")
    source = tmp_path / "fp8"
    meant = foreign(tiny("mixtral", **SMALL), source, store, config)
    twin = tensors_of(tiny("mixtral", **SMALL)) | {key: value.float() for key, value in meant.items()}
    exact = {key: open_source(source).read(key) for key in meant}
    edited(tiny("mixtral", **SMALL), tmp_path / "twin", lambda tensors: tensors.update(twin | exact))
    for file in (tmp_path / "twin").glob("model-*"):
        file.unlink()
    schemes: Any = {"experts": Scheme("int4"), "attention": Scheme("int8")}
    report = convert(source, tmp_path / "out", schemes, rounding="rtn")
    convert(tmp_path / "twin", tmp_path / "expected", schemes, rounding="rtn")
    found, expected = packed_weights(tmp_path / "out"), packed_weights(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert all((found[key].packed == expected[key].packed).all() for key in expected)
    assert any("weights in fp8" in note for note in report.notes)
    assert report.source_bytes == sum(value.nbytes for value in tensors_of(source).values())
    kept = tensors_of(tmp_path / "out")["lm_head.weight"]
    assert kept.dtype is torch.bfloat16 and (kept == exact["lm_head.weight"].bfloat16()).all()


SCALE = f"{EXPERT}.weight_scale"
REFUSED: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "no scale": (lambda t: t.pop(SCALE), f"{EXPERT}.weight has no scales: expected {SCALE} beside it"),
    "no weight": (lambda t: t.pop(f"{EXPERT}.weight"), f"{SCALE} is a part of a quantized weight whose other"),
    "a scale beside a dense weight": (
        lambda t: t.update({f"{EXPERT}.weight": t[f"{EXPERT}.weight"].bfloat16()}),
        f"{SCALE} is a part of a quantized weight whose other",
    ),
    "scales in fp8": (
        lambda t: t.update({SCALE: t[SCALE].to(torch.float8_e4m3fn)}),
        f"{SCALE} has no scales|{SCALE} has dtype F8_E4M3: expected BF16 or F16 or F32",
    ),
    "too few scales": (lambda t: t.update({SCALE: t[SCALE][1:]}), rf"{SCALE} has shape \[127, 1\]: expected"),
    "scales of columns": (lambda t: t.update({SCALE: t[SCALE].t()}), rf"{SCALE} has shape \[1, 128\]: expected"),
    "one scale": (lambda t: t.update({SCALE: t[SCALE][0]}), rf"{SCALE} has shape \[1\]: expected \[128, 1\]"),
    "the other fp8": (
        lambda t: t.update({f"{EXPERT}.weight": t[f"{EXPERT}.weight"].to(torch.float8_e5m2)}),
        f"{SCALE} is a part",
    ),
    "another shape": (
        lambda t: t.update({f"{EXPERT}.weight": t[f"{EXPERT}.weight"][:, 1:]}),
        rf"{EXPERT}.weight has shape \[128, 127\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_belong_together_is_refused_by_name(tiny: Tiny, tmp_path: Path, case: str) -> None:
    edit, said = REFUSED[case]
    foreign(tiny("mixtral", **SMALL), tmp_path / "fp8", *compressed("channel"))
    with pytest.raises(CheckpointError, match=said):
        open_source(edited(tmp_path / "fp8", tmp_path / "model", edit))
