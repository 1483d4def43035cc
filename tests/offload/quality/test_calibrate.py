"""Calibration: less divergence in the same format, resumable per layer, and clear about texts too short."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from offload.plan import footprint
from offload.quality.calibrate import calibrate
from offload.quality.windows import Windows
from offload.quality.work_folder import Calibration
from quant.checkpoint.checkpoint import Checkpoint
from quant.convert.convert import REPORT, convert
from quant.errors import InputError, OutputError
from quant.model.families import Role
from quant.rounding.prepared import Prepared
from quant.rounding.rounding import Nearest
from quant.scheme import Scheme
from tests import oracle

IDS = torch.randint(0, 256, (4, 96), generator=torch.Generator().manual_seed(1))
SCHEMES: dict[Role, Scheme] = {
    "experts": Scheme("int4"),
    "shared_expert": Scheme("int4"),
    "dense_mlp": Scheme("int4"),
    "attention": Scheme("int4"),
}


def windows(count: int = 40) -> Windows:
    return Windows(torch.randint(0, 256, (count, 64), generator=torch.Generator().manual_seed(0)))


def finish(source: Path, folder: Path, destination: Path) -> Path:
    convert(source, destination, SCHEMES, rounder=Prepared(folder, "gptq test", Nearest()))
    return destination


def divergence(source: Path, quantized: Path) -> float:
    with torch.inference_mode():
        ours = torch.log_softmax(oracle.stock(source, quantized)(input_ids=IDS).logits, -1)
        theirs = torch.log_softmax(oracle.stock(source, source)(input_ids=IDS).logits, -1)
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


@pytest.mark.parametrize("family", ["llama4_maverick", "qwen3_moe"])
def test_every_family_calibrates_into_a_checkpoint_nearer_to_its_source(
    family: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny(family)
    seen = calibrate(Checkpoint.open(source), SCHEMES, windows(), tmp_path / "work")
    calibrated = finish(source, tmp_path / "work", tmp_path / "gptq")
    convert(source, tmp_path / "rtn", SCHEMES, rounding="rtn")
    assert divergence(source, calibrated) < 0.9 * divergence(source, tmp_path / "rtn")
    errors = seen.output_errors()
    assert set(errors) == {spec.role for spec in Checkpoint.open(source).shape.linears() if spec.role in SCHEMES}
    assert all(0 < error["calibrated"] < error["alone"] < 0.5 for error in errors.values()), errors
    assert seen.tokens == 40 * 64 and "the least used expert saw" in seen.notes()[0]
    report = json.loads((calibrated / REPORT).read_text())
    assert report["rounding"] == "gptq test"


def test_a_stopped_calibration_goes_on_after_its_last_layer(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny("llama4_text")
    checkpoint, text = Checkpoint.open(source), windows(12)
    calibrate(checkpoint, SCHEMES, text, tmp_path / "whole")

    def stop(done: int, total: int, what: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(checkpoint, SCHEMES, text, tmp_path / "work", progress=stop)
    with pytest.raises(OutputError, match="continue it with --resume"):
        calibrate(checkpoint, SCHEMES, text, tmp_path / "work")
    with pytest.raises(OutputError, match="another model, text or scheme"):
        calibrate(checkpoint, SCHEMES, windows(13), tmp_path / "work", resume=True)
    layers: list[int] = []
    calibrate(
        checkpoint,
        SCHEMES,
        text,
        tmp_path / "work",
        resume=True,
        progress=lambda done, total, what: layers.append(done),
    )
    assert layers == [2, 3, 4]
    for file in sorted((tmp_path / "whole").glob("layer-*")):
        assert file.read_bytes() == (tmp_path / "work" / file.name).read_bytes()


def test_a_text_too_short_is_refused_with_what_an_expert_would_see(tiny: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny("llama4_text")
    with pytest.raises(InputError, match=r"an expert sees 16 on average: expected at least 64.*512 tokens"):
        calibrate(Checkpoint.open(source), SCHEMES, windows(2), tmp_path / "work")


def test_what_a_calibration_saw_is_said() -> None:
    seen = Calibration(5_000, {0: 312, 4: 7}, {"layers.0.a": 0.1, "layers.2.b": 10.0})
    first, second = seen.notes()
    assert first == "calibrated on 5,000 tokens; the least used expert saw 7 of them (layer 4)"
    assert "2 Hessians were not positive definite" in second and "up to 10 of" in second
    assert second.endswith("(layers.2.b)")


def test_an_expert_that_saw_nothing_lives_on_the_tokens_of_all(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny("llama4_text")
    monkeypatch.setattr(footprint, "MIN_EXPERT_TOKENS", 1)
    text = Windows(torch.full((1, 64), 65))  # one token throughout: one expert for nearly all
    seen = calibrate(Checkpoint.open(source), SCHEMES, text, tmp_path / "work")
    assert min(seen.least_used.values()) == 0
    quantized = Checkpoint.open(finish(source, tmp_path / "work", tmp_path / "out"))
    for spec in quantized.shape.expert_linears(0, 0):
        assert torch.isfinite(oracle.dense_weight(quantized, spec)).all()
