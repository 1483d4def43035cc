"""What rounding a vision tower did to the rows that pictures become: those of two checkpoints, side by side."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.functional import cosine_similarity

from offload.text.tokenizer import load_tokenizer
from offload.vision.image_file import ImageSource, open_image
from offload.vision.images import check_looking
from offload.vision.processor import PLACEHOLDER, ImageProcessor
from offload.vision.tower import VisionTower
from quant.checkpoint.checkpoint import Checkpoint
from quant.progress import Progress, nobody


@dataclass(frozen=True)
class ImageRows:
    """Both towers' rows in f32: how many, ‖ours - theirs‖ / ‖theirs‖ over all of them, and how alike the directions of
    a row are, in the mean and at the least."""

    rows: int
    relative_error: float
    cosine_mean: float
    cosine_min: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare_images(
    model: Checkpoint, reference: Checkpoint, images: Sequence[ImageSource], progress: Progress = nobody
) -> ImageRows:
    """The rows of ``model`` beside those of ``reference`` for ``images``, cut as the reference says.

    Raises UsageError for a model that reads text only, InputError for what is no image, CheckpointError if one has no
    tower or not all of it.
    """
    for checkpoint in (model, reference):
        check_looking(checkpoint.shape, room=True)
    towers = [VisionTower(checkpoint, torch.device("cpu"), torch.float32) for checkpoint in (model, reference)]
    opened = [open_image(source, f"image {index}") for index, source in enumerate(images, 1)]
    processor = ImageProcessor(reference, load_tokenizer(reference.path))
    rows, squares, errors, cosines, least = 0, 0.0, 0.0, 0.0, 1.0
    for index, image in enumerate(opened):
        progress(index, len(opened), "image by image")
        _, [pixels] = processor.encode(PLACEHOLDER, [image], add_special_tokens=False)
        ours, theirs = (tower.encode(pixels.float()) for tower in towers)
        alike = cosine_similarity(ours, theirs)
        rows += len(alike)
        squares += float(theirs.square().sum(dtype=torch.float64))
        errors += float((ours - theirs).square().sum(dtype=torch.float64))
        cosines += float(alike.sum(dtype=torch.float64))
        least = min(least, float(alike.min()))
    return ImageRows(rows, (errors / squares) ** 0.5 if squares else 0.0, cosines / rows if rows else 1.0, least)
