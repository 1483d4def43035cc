"""What a calibration tells about itself."""

import pytest

from offload.quality.work_folder import Calibration


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
