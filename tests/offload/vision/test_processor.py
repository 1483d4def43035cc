"""A prompt with images: the ids and pixels that transformers' own processor makes of the same.

``stock_tiles.safetensors`` holds what it made (``Llama4Processor`` with torchvision 0.28) of each of
tests.images.KINDS in the text "see <|image|> here": ids, and pixels before they are scaled to −1 to 1.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from offload.text.tokenizer import load_tokenizer
from offload.vision.image_file import open_image
from offload.vision.processor import ImageProcessor
from quant.checkpoint.checkpoint import Checkpoint
from quant.errors import CheckpointError, InputError
from tests import images

STOCK = load_file(Path(__file__).with_name("stock_tiles.safetensors"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images.make_model(tmp_path_factory.mktemp("vision") / "model")


@pytest.fixture(scope="module")
def processor(model: Path) -> ImageProcessor:
    return ImageProcessor(Checkpoint.open(model), load_tokenizer(model))


@pytest.mark.parametrize("name", images.KINDS)
def test_an_image_file_is_what_transformers_makes_of_it(name: str, processor: ImageProcessor, tmp_path: Path) -> None:
    file = tmp_path / name
    images.KINDS[name](file)
    ids, [pixels] = processor.encode("see <|image|> here", [open_image(file)], add_special_tokens=True)
    assert ids == STOCK[f"{name}/ids"].tolist()
    scaled = (STOCK[f"{name}/pixels"].to(torch.bfloat16) * (1 / 255) - 0.5) / 0.5
    assert pixels.equal(scaled)


def test_several_images_of_different_sizes_in_one_text(processor: ImageProcessor) -> None:
    seen = [images.picture(100, 30, seed=1), images.picture(28, 28, seed=2), images.picture(20, 90, seed=3)]
    alone = [processor.encode("<|image|>", [image], add_special_tokens=False) for image in seen]
    ids, found = processor.encode("a <|image|><|image|> b <|image|>", seen, add_special_tokens=False)
    assert all(pixels.equal(own) for pixels, (_, [own]) in zip(found, alone, strict=True))
    spelled = [token for part, _ in alone for token in part]
    assert [token for token in ids if token >= 256] == spelled


@pytest.mark.parametrize(
    ("text", "count", "said"),
    [
        ("no place", 1, "0 places for images .* and 1 images"),
        ("<|image|> <|image|>", 1, "2 places for images .* and 1 images"),
        ("<|image|>", 0, "1 places for images .* and 0 images"),
        ("<|image|> and <|patch|>", 1, r"contains <\|patch\|>"),
    ],
)
def test_places_and_images_that_do_not_match_are_refused(
    text: str, count: int, said: str, processor: ImageProcessor
) -> None:
    with pytest.raises(InputError, match=said):
        processor.encode(text, [images.picture(9, 9)] * count, add_special_tokens=True)


@pytest.mark.parametrize(
    "content",
    [
        '{"max_patches": 1000000000}',
        '{"size": {"height": 0, "width": 0}}',
        '{"size": {"height": 20, "width": 30}}',
        "[]",
        '{"image_mean": "x"}',
        '{"image_std": [0, 1, 1]}',
        '{"do_resize": false}',
        '{"image_processor": 5}',
    ],
)
def test_settings_that_none_can_have_are_refused(content: str, model: Path, tmp_path: Path) -> None:
    for file in model.iterdir():
        if file.name not in ("processor_config.json", "preprocessor_config.json"):
            (tmp_path / file.name).symlink_to(file)
    checkpoint, tokenizer = Checkpoint.open(tmp_path), load_tokenizer(model)
    with pytest.raises(CheckpointError, match="has neither"):
        ImageProcessor(checkpoint, tokenizer)
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(CheckpointError, match="processor"):
        ImageProcessor(checkpoint, tokenizer)
