"""Integers are what compressed-tensors unpacks: every strategy, with zero points and activation order."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

from quant.convert.convert import convert
from quant.errors import CheckpointError
from quant.scheme import Scheme
from quant.sources.open import open_source
from tests.quant.sources.foreign import Tensors, edited, foreign, rows_equal

Tiny = Callable[..., Path]
SMALL = {"num_hidden_layers": 2, "num_local_experts": 4}
EXPERT = "model.layers.1.block_sparse_moe.experts.3.w2"


def compressed(
    bits: int, strategy: str, symmetric: bool, form: str = "pack-quantized", group: int | None = None
) -> tuple[Any, dict[str, Any]]:
    """How compressed-tensors stores a weight in integers, and the config for it."""
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy=strategy, group_size=group)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
    compressor: Any = BaseCompressor.get_value_from_registry(form)

    def store(weight: Tensor) -> tuple[Tensors, Tensor]:
        cut = weight.float().view(len(weight), -1, group or weight.shape[1])
        dims = (0, 1, 2) if strategy == "tensor" else (2,)
        scale, zero = calculate_qparams(cut.amin(dims), cut.amax(dims), args)
        scale, zero = (one.reshape(-1, 1) if one.numel() == 1 else one for one in (scale.to(weight.dtype), zero))
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}
        made = compressor.compress(state, scheme)
        if symmetric:
            made.pop("weight_zero_point", None)
        return made, compressor.decompress(dict(made), scheme)["weight"]

    return store, {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": args.model_dump(mode="json")}},
        "ignore": ["re:.*router"],
    }


FORMS: dict[str, tuple[Any, ...]] = {
    "int4, groups of 32": (4, "group", True, "pack-quantized", 32),
    "int4, groups of 64, zero points": (4, "group", False, "pack-quantized", 64),
    "int8, groups of 64, zero points": (8, "group", False, "pack-quantized", 64),
    "int4, a scale per channel": (4, "channel", True),
    "int4, a scale per channel, zero points": (4, "channel", False),
    "int8, a scale per channel": (8, "channel", True, "int-quantized"),
    "int8, a scale per channel, zero points": (8, "channel", False, "int-quantized"),
    "int8, a scale per tensor": (8, "tensor", True, "int-quantized"),
    "int8, groups of 32": (8, "group", True, "int-quantized", 32),
}


@pytest.mark.parametrize("form", FORMS)
def test_compressed_tensors_gives_the_same_bits(tiny: Tiny, tmp_path: Path, form: str) -> None:
    store, config = compressed(*FORMS[form])
    meant = foreign(tiny("mixtral", **SMALL), tmp_path / "model", store, config)
    rows_equal(tmp_path / "model", meant)
    assert open_source(tmp_path / "model").forms == f"{len(meant)} weights in {form}"  # type: ignore[attr-defined]


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_order_of_activations_says_which_group_a_column_is_of(tiny: Tiny, tmp_path: Path, symmetric: bool) -> None:
    plain, config = compressed(4, "group", symmetric, "pack-quantized", 32)

    def store(weight: Tensor) -> tuple[Tensors, Tensor]:
        """Columns sorted as GPTQ sorts them are quantized in groups, and then put back where they were."""
        order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(0))
        made, dense = plain(weight[:, order])
        back = torch.argsort(order)
        codes = unpack_from_int32(made["weight_packed"], 4, weight.shape)[:, back]
        made["weight_packed"] = pack_to_int32(codes.contiguous(), 4)
        made["weight_g_idx"] = (back // 32).to(torch.int32)
        return made, dense[:, back]

    meant = foreign(tiny("mixtral", **SMALL), tmp_path / "model", store, config)
    rows_equal(tmp_path / "model", meant)


def test_what_coldstream_wrote_can_be_quantized_again(tiny: Tiny, tmp_path: Path) -> None:
    convert(tiny("olmoe", num_hidden_layers=1), tmp_path / "int8", {"experts": Scheme("int8")}, rounding="rtn")
    report = convert(tmp_path / "int8", tmp_path / "int4", {"experts": Scheme("int4")}, rounding="rtn")
    assert any("weights in int8, a scale per channel, not from the original" in note for note in report.notes)


ASYMMETRIC = (4, "group", False, "pack-quantized", 32)
SCALE, ZERO, WORDS, SHAPE = (f"{EXPERT}.weight_{name}" for name in ("scale", "zero_point", "packed", "shape"))
ORDER = f"{EXPERT}.weight_g_idx"
REFUSED: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "no scale": (lambda t: t.pop(SCALE), f"{WORDS} has no scales: expected {SCALE}"),
    "no zero points": (lambda t: t.pop(ZERO), f"{WORDS} has no zero points: expected {ZERO}"),
    "no shape": (lambda t: t.pop(SHAPE), f"{WORDS} has no shape"),
    "no words": (lambda t: t.pop(WORDS), f"{EXPERT}.weight_.* is a part of a quantized weight"),
    "scales in I32": (lambda t: t.update({SCALE: t[SCALE].int()}), f"{SCALE} has dtype I32: expected BF16"),
    "words in F32": (lambda t: t.update({WORDS: t[WORDS].float()}), f"{WORDS} has dtype F32: expected I32"),
    "zero points in I8": (lambda t: t.update({ZERO: t[ZERO].to(torch.int8)}), f"{ZERO} has dtype I8: expected I32"),
    "three groups": (lambda t: t.update({SCALE: t[SCALE][:, :3]}), f"{SCALE} has 3 groups for 128 columns"),
    "groups of half the size": (
        lambda t: t.update({SCALE: t[SCALE].repeat(1, 2)}),
        f"{SCALE} has 8 scales for 128 columns: config.json says one for 32 columns",
    ),
    "a scale per row": (lambda t: t.update({SCALE: t[SCALE][:, :1]}), f"{SCALE} has 1 scales for 128 columns"),
    "fewer words": (lambda t: t.update({WORDS: t[WORDS][:, 1:]}), rf"{WORDS} is \[128, 15\] words for a 128x128"),
    "fewer zero points": (lambda t: t.update({ZERO: t[ZERO][1:]}), rf"{ZERO} has shape \[15, 4\]: expected \[16, 4\]"),
    "a shape that is none": (lambda t: t.update({SHAPE: torch.tensor([-128, -128])}), f"{WORDS} is"),
    "another shape": (
        lambda t: t.update({SHAPE: torch.tensor([128, 64])}),
        f"integers of 8 bits, in which {EXPERT} is: expected one",
    ),
    "an order too short": (lambda t: t.update({ORDER: torch.zeros(8).int()}), rf"{ORDER} has shape \[8\]"),
    "dense beside": (lambda t: t.update({f"{EXPERT}.weight": torch.ones(128, 128)}), "twice, dense and quantized"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_belong_together_is_refused_by_name(tiny: Tiny, tmp_path: Path, case: str) -> None:
    edit, said = REFUSED[case]
    foreign(tiny("mixtral", **SMALL), tmp_path / "source", *compressed(*ASYMMETRIC))
    with pytest.raises(CheckpointError, match=said):
        open_source(edited(tmp_path / "source", tmp_path / "model", edit))


def test_zero_points_of_symmetric_weights_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    store, _ = compressed(*ASYMMETRIC)
    foreign(tiny("mixtral", **SMALL), tmp_path / "source", store, compressed(4, "group", True, "pack-quantized", 32)[1])
    with pytest.raises(CheckpointError, match=r"is a zero point, but config.json says that the weights are symmetric"):
        open_source(tmp_path / "source")


def test_groups_outside_the_scales_are_refused_when_they_are_read(tiny: Tiny, tmp_path: Path) -> None:
    foreign(tiny("mixtral", **SMALL), tmp_path / "source", *compressed(*ASYMMETRIC))
    far = edited(tmp_path / "source", tmp_path / "model", lambda t: t.update({ORDER: torch.full((128,), 9).int()}))
    with pytest.raises(CheckpointError, match=f"{ORDER} names groups 9 to 9: expected 0 to 3"):
        open_source(far).read(f"{EXPERT}.weight")


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"quant_method": "hqq"}, "quantized by 'hqq': expected one of compressed-tensors"),
    "no object": ([], r"quantization_config is \[\]: expected an object"),  # type: ignore[dict-item]
    "nvfp4": (
        {"quant_method": "compressed-tensors", "config_groups": {"0": {"weights": {"num_bits": 4, "type": "float"}}}},
        "4 bits, type float",
    ),
    "rotations": (
        {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"R1": {}}}},
        "rotated weights",
    ),
    "sparsity": (
        {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
        "sparse weights",
    ),
    "marlin": (
        {
            "quant_method": "compressed-tensors",
            "format": "marlin-24",
            "config_groups": {"0": {"weights": {"num_bits": 4}}},
        },
        "in format marlin-24",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_what_a_config_asks_for_and_is_not_known_is_refused(tiny: Tiny, tmp_path: Path, case: str) -> None:
    config, said = CONFIGS[case]
    foreign(tiny("mixtral", **SMALL), tmp_path / "model", compressed(*ASYMMETRIC)[0], {})
    text = json.loads((tmp_path / "model" / "config.json").read_text()) | {"quantization_config": config}
    (tmp_path / "model" / "config.json").write_text(json.dumps(text))
    with pytest.raises(CheckpointError, match=said):
        open_source(tmp_path / "model")
