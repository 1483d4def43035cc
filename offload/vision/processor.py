"""A text with images as token ids: what transformers' ``Llama4Processor`` makes of both.

Legend: S side of a tile in pixels, T tiles of an image.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from offload.text.tokenizer import encode, encode_text
from offload.vision.tiles import Cutting, cut
from quant.checkpoint.checkpoint import Checkpoint
from quant.errors import CheckpointError, InputError
from quant.input_file import read_object, validated

PLACEHOLDER = "<|image|>"  # in a text; it stands before the whole picture among its tokens, too
_FILES = ("preprocessor_config.json", "processor_config.json")


class _Counting(BaseModel):
    """How many rows a tile becomes, by ``processor_config.json``."""

    model_config = ConfigDict(strict=True, extra="ignore")

    patch_size: Annotated[int, Field(ge=1, le=4096)] = 14
    pixel_shuffle_ratio: Annotated[float, Field(gt=0, le=1)] = 0.5


class ImageProcessor:
    """Cuts images into tiles and puts their tokens into a text.

    ``tokenizer`` is the model's. Raises CheckpointError if the checkpoint does not say how its images are cut, or says
    what cannot be.
    """

    def __init__(self, checkpoint: Checkpoint, tokenizer: Any) -> None:
        self._tokenizer, self.image_token = tokenizer, _image_token(checkpoint)
        self._cutting, counting = _settings(checkpoint.path)
        self.tile_side = self._cutting.size.height
        patches = (self.tile_side // counting.patch_size) ** 2
        self.rows_per_tile = patches // round(1 / counting.pixel_shuffle_ratio**2)

    def encode(
        self, text: str, images: Sequence[Image.Image], *, add_special_tokens: bool
    ) -> tuple[list[int], list[Tensor]]:
        """Token ids of ``text``, in which each PLACEHOLDER stands for the next of ``images``; and each image's
        pixels, bf16 ``[T, 3, S, S]``. One id is ``image_token`` for each row that an image becomes.

        Raises InputError as ``around_places``, and if the text has image tokens of its own.
        """
        parts = around_places(text, len(images))
        joined, pixels = parts[0], list[Tensor]()
        for image, part in zip(images, parts[1:], strict=True):
            tiles, grid = cut(torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous(), self._cutting)
            pixels.append(tiles)
            joined += self._spelled(*grid) + part
        ids = encode(self._tokenizer, joined) if add_special_tokens else encode_text(self._tokenizer, joined, False)
        if ids.count(self.image_token) != sum(map(len, pixels)) * self.rows_per_tile:
            raise InputError(
                f"the text itself contains {self._tokenizer.convert_ids_to_tokens(self.image_token)}, which stands "
                "for a part of an image: take it out"
            )
        return ids, pixels

    def _spelled(self, rows: int, columns: int) -> str:
        """What stands in the text for an image of so many tiles."""
        tile = "<|patch|>" * self.rows_per_tile
        row = "<|tile_x_separator|>".join([tile] * columns) + "<|tile_y_separator|>"
        return f"<|image_start|>{row * rows if rows * columns > 1 else ''}{PLACEHOLDER}{tile}<|image_end|>"


def around_places(text: str, count: int) -> list[str]:
    """What ``text`` says before, between and after its ``count`` PLACEHOLDERs. Raises InputError if it has not so
    many."""
    parts = text.split(PLACEHOLDER)
    if len(parts) - 1 != count:
        raise InputError(
            f"the text has {len(parts) - 1} places for images ({PLACEHOLDER}) and {count} images were given: "
            "expected one place for each"
        )
    return parts


def _image_token(checkpoint: Checkpoint) -> int:
    said = checkpoint.config.get("image_token_index", checkpoint.config.get("image_token_id", 200092))
    if not isinstance(said, int) or isinstance(said, bool) or said < 0:
        raise CheckpointError(f"config.json: image_token_index is {said!r}: expected the id of a token")
    return said


def _settings(folder: Path) -> tuple[Cutting, _Counting]:
    found = {name: read_object(folder / name, "how images are cut") for name in _FILES if (folder / name).exists()}
    if not found:
        raise CheckpointError(
            f"{folder} has neither {' nor '.join(_FILES)}, which say how images are cut: copy them from where the "
            "model is from"
        )
    merged = {key: value for said in found.values() for key, value in said.items()}
    names = " and ".join(found)
    cutting = validated(Cutting, merged.get("image_processor", merged), f"{folder / names}")
    return cutting, validated(_Counting, merged, f"{folder / names}")
