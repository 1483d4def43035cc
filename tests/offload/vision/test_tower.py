"""The vision tower gives what the stock one gives, and keeps nothing between images."""

from pathlib import Path

import pytest
import torch
from transformers import Llama4ForConditionalGeneration

from offload.vision.tower import VisionTower
from quant.checkpoint.checkpoint import Checkpoint
from quant.errors import CheckpointError
from tests import checkpoints, images


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images.make_model(tmp_path_factory.mktemp("vision") / "model")


def test_rows_are_those_of_the_stock_tower_and_projector(model: Path) -> None:
    tower = VisionTower(Checkpoint.open(model), torch.device("cpu"), torch.float32)
    stock = Llama4ForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval()
    pixels = torch.rand(7, 3, 28, 28) * 2 - 1  # more tiles than run at once
    with torch.inference_mode():
        expected = stock.multi_modal_projector(stock.vision_model(pixels).last_hidden_state.flatten(0, 1))
    for _ in range(2):  # the weights are read again
        torch.testing.assert_close(tower.encode(pixels), expected, atol=1e-5, rtol=1e-5)
    modules = (*tower._tower.parameters(), *tower._projector.parameters())
    assert all(parameter.device.type == "meta" for parameter in modules)


def test_a_model_of_text_alone_has_no_tower(tmp_path: Path) -> None:
    checkpoints.make("llama4_text", tmp_path)
    with pytest.raises(CheckpointError, match="no vision tower"):
        VisionTower(Checkpoint.open(tmp_path), torch.device("cpu"), torch.float32)
