"""What a calibration keeps and tells about itself."""

import os
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch

from offload.quality.work_folder import Calibration, CalibrationState
from quant.errors import OutputError

JOB = {"source": "abc", "state": [["model.safetensors", 10, 20]], "schemes": {"experts": "int4-g128"}}
STREAMS = [torch.arange(12.0).view(1, 3, 4), torch.ones(1, 3, 4)]


def kept(folder: Path) -> Path:
    """A work folder after its second layer."""
    state = CalibrationState.open(folder, JOB, resume=False)
    state.calibration.least_used[0] = 17
    state.calibration.tuned[0] = (0.5, 0.25)
    state.calibration.add_outputs("experts", (4.0, 1.0, 2.0))
    for layer in range(2):
        state.keep(layer, {f"layers.{layer}.sums": torch.tensor([1.0, 2.0])}, STREAMS)
    return folder


def test_what_was_kept_is_what_a_resumed_run_goes_on_from(tmp_path: Path) -> None:
    state = CalibrationState.open(kept(tmp_path), JOB, resume=True)
    assert state.layer == 2
    assert all(torch.equal(a, b) for a, b in zip(state.streams(torch.zeros(1)), STREAMS, strict=True))
    seen = state.calibration
    assert (seen.least_used, seen.tuned) == ({0: 17}, {0: (0.5, 0.25)})
    assert seen.output_errors() == {"experts": {"calibrated": 0.5, "alone": pytest.approx(0.5**0.5)}}


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def _flip(file: Path) -> None:
    data, source = bytearray(file.read_bytes()), Random(file.name)
    data[source.randrange(len(data))] ^= 1 << source.randrange(8)
    file.write_bytes(data)


def _not_utf8(file: Path) -> None:
    file.write_bytes(b"\xff\xfe" * 40)


def _pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize("name", ["about.json", "layer-00000.safetensors", "streams-00002.safetensors"])
@pytest.mark.parametrize("spoil", [_cut, _flip, _not_utf8, _pipe])
def test_what_was_spoiled_is_refused_in_one_line(spoil: Callable[[Path], None], name: str, tmp_path: Path) -> None:
    spoil(kept(tmp_path) / name)
    with pytest.raises(OutputError, match="start again without --resume") as refusal:
        CalibrationState.open(tmp_path, JOB, resume=True)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("ratios", "words"),
    [
        ([0.9, 0.8], "tuning lowered the error of a layer's output on text kept back by 15.0% (median)"),
        ([0.9996, 1.0], "tuning gained nothing"),
        ([1.0, 1.0], "tuning gained nothing"),
        ([0.5, 1.0], "1 layers came no nearer"),
    ],
)
def test_tuning_says_what_it_gained_and_that_it_gained_nothing(ratios: list[float], words: str) -> None:
    [_, note] = Calibration(100, tuned={layer: (1.0, ratio) for layer, ratio in enumerate(ratios)}).notes()
    assert words in note and "0.0%" not in note
