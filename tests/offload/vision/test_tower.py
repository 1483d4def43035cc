"""The vision tower gives what the stock one gives, and keeps nothing between images."""

from pathlib import Path
from typing import Any

import pytest
import torch

from offload.hardware.ledger import resident_bytes
from offload.hardware.system import give_back_freed
from offload.vision.tower import VisionTower
from quant.checkpoint.checkpoint import Checkpoint
from quant.convert.quantize import quantize
from quant.errors import CheckpointError, NonFiniteError
from tests import checkpoints, images, oracle


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images.make_model(tmp_path_factory.mktemp("vision") / "model")


@pytest.mark.parametrize("scheme", ["bf16", "int8-g32"])
def test_rows_are_those_of_the_stock_tower_and_projector(model: Path, tmp_path: Path, scheme: str) -> None:
    quantize(model, tmp_path / "quantized", experts="int4-g32", attention="int4-g32", vision=scheme)
    tower = VisionTower(Checkpoint.open(tmp_path / "quantized"), torch.device("cpu"), torch.float32)
    stock: Any = oracle.stock(model, tmp_path / "quantized")
    pixels = torch.rand(7, 3, 28, 28) * 2 - 1  # more tiles than run at once
    with torch.inference_mode():
        expected = stock.multi_modal_projector(stock.vision_model(pixels).last_hidden_state.flatten(0, 1))
    for _ in range(2):  # the weights are read again
        torch.testing.assert_close(tower.encode(pixels), expected, atol=1e-5, rtol=1e-5)
    modules = (*tower._tower.parameters(), *tower._projector.parameters())
    assert all(parameter.device.type == "meta" for parameter in modules)


def test_the_heap_does_not_keep_what_the_tower_has_left(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16, "image_size": 112}
    model = images.make_model(tmp_path, vision_config=sizes | {"projector_input_dim": 64})
    tower = VisionTower(Checkpoint.open(model), torch.device("cpu"), torch.float32)
    give_back_freed()
    before = resident_bytes()
    for _ in range(2):
        tower.encode(torch.rand(1, 3, 112, 112))
    assert resident_bytes() - before < 24 * 2**20  # of 200 MiB of weights in f32, one layer of them 12


def test_a_quantized_tower_whose_scales_are_no_numbers_is_refused(model: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "quantized", vision="int8-g32")
    checkpoint = Checkpoint.open(tmp_path / "quantized")
    entry = checkpoint.entry("multi_modal_projector.linear_1.weight_scale")
    with entry.file.open("r+b") as file:
        file.seek(entry.offset)
        file.write(b"\xc0\x7f")
    tower = VisionTower(Checkpoint.open(tmp_path / "quantized"), torch.device("cpu"), torch.float32)
    with pytest.raises(NonFiniteError, match=r"multi_modal_projector\.linear_1\.weight"):
        tower.encode(torch.rand(1, 3, 28, 28))


def test_a_model_of_text_alone_has_no_tower(tmp_path: Path) -> None:
    checkpoints.make("llama4_text", tmp_path)
    with pytest.raises(CheckpointError, match="no vision tower"):
        VisionTower(Checkpoint.open(tmp_path), torch.device("cpu"), torch.float32)
