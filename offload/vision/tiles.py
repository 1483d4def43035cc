"""A picture cut into square tiles, as Llama 4 sees one: the tiles of the canvas that fits it best, then the whole.

The arithmetic is that of transformers' ``Llama4ImageProcessor``, to the bit. That class itself needs torchvision,
whose build must match torch's so exactly that one beside another's breaks every import of transformers;
what it computes is forty lines of torch.

Legend: S side of a tile in pixels, T tiles.
"""

import math
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from torch.nn.functional import interpolate, pad

_Three = Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=3, max_length=3)]


class _Size(BaseModel):
    height: Annotated[int, Field(ge=1, le=4096)]
    width: Annotated[int, Field(ge=1, le=4096)]


class Cutting(BaseModel):
    """How pictures are cut: the keys of ``preprocessor_config.json`` that say so, with transformers' defaults."""

    model_config = ConfigDict(strict=True, extra="ignore")

    do_resize: Literal[True] = True
    do_rescale: bool = True
    do_normalize: bool = True
    rescale_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1 / 255
    image_mean: _Three = [0.5, 0.5, 0.5]
    image_std: _Three = [0.5, 0.5, 0.5]
    resample: Literal[2] = 2  # bilinear, as Pillow numbers it
    max_patches: Annotated[int, Field(ge=1, le=64)] = 16
    resize_to_max_canvas: bool = False
    size: _Size = _Size(height=336, width=336)

    @model_validator(mode="after")
    def _possible(self) -> "Cutting":
        if self.size.height != self.size.width:
            raise ValueError(f"size is {self.size.height} × {self.size.width}: expected a square")
        if 0 in self.image_std:
            raise ValueError("image_std has a zero: expected numbers to divide by")
        return self


def cut(picture: Tensor, cutting: Cutting) -> tuple[Tensor, tuple[int, int]]:
    """picture uint8 ``[3, height, width]`` → tiles bf16 ``[T, 3, S, S]``, and their rows and columns on the canvas.

    Tiles come row by row; where there are several, the picture as a whole, pressed into one tile, is the last.
    """
    side = cutting.size.height
    height, width = picture.shape[1:]
    canvas = _canvas(height, width, cutting)
    rows, columns = canvas[0] // side, canvas[1] // side
    bounds = canvas if cutting.resize_to_max_canvas else _enlarged(height, width, canvas, side)
    fitted = _resize(picture, *_within(height, width, bounds))
    below, right = canvas[0] - fitted.shape[1], canvas[1] - fitted.shape[2]
    whole = _normalized(pad(fitted, (0, right, 0, below)), cutting)
    tiles = whole.view(3, rows, side, columns, side).permute(1, 3, 0, 2, 4).reshape(rows * columns, 3, side, side)
    if rows * columns > 1:
        tiles = torch.cat((tiles, _normalized(_resize(picture, side, side), cutting)[None]))
    return tiles, (rows, columns)


def _canvas(height: int, width: int, cutting: Cutting) -> tuple[int, int]:
    """The canvas of whole tiles, at most ``max_patches`` of them, on which the picture is enlarged least, or, where
    all are smaller, reduced least; of those the smallest, and of equal ones the first in transformers' order."""
    side = cutting.size.height
    by_ratio: dict[float, list[tuple[int, int]]] = {}
    for tiles in range(cutting.max_patches, 0, -1):
        for rows in (rows for rows in range(1, tiles + 1) if tiles % rows == 0):
            by_ratio.setdefault(rows * rows / tiles, []).append((rows * side, tiles // rows * side))
    found = torch.tensor([canvas for canvases in by_ratio.values() for canvas in canvases])
    across, down = found[:, 1] / width, found[:, 0] / height
    scales = torch.where(down > across, across, down)  # f32, as there: equal scales are to compare as equal
    larger = scales[scales >= 1]
    chosen = scales.max() if not len(larger) else larger.max() if cutting.resize_to_max_canvas else larger.min()
    best = found[scales == chosen]
    rows_, columns_ = best[best.prod(1).argmin()].tolist()
    return rows_, columns_


def _enlarged(height: int, width: int, canvas: tuple[int, int], side: int) -> tuple[int, int]:
    """Bounds that let a picture grow up to one tile's side, not to all of the canvas."""
    return min(max(height, side), canvas[0]), min(max(width, side), canvas[1])


def _within(height: int, width: int, bounds: tuple[int, int]) -> tuple[int, int]:
    """The greatest size of the picture's proportions within ``bounds``, height first."""
    across, down = bounds[1] / width, bounds[0] / height
    if across < down:
        return max(min(math.floor(height * across), bounds[0]), 1), bounds[1]
    return bounds[0], max(min(math.floor(width * down), bounds[1]), 1)


def _resize(picture: Tensor, height: int, width: int) -> Tensor:
    if picture.shape[1:] == (height, width):
        return picture
    return interpolate(picture[None], size=(height, width), mode="bilinear", align_corners=False, antialias=True)[0]


def _normalized(picture: Tensor, cutting: Cutting) -> Tensor:
    """In bf16, as the model was trained."""
    values = picture.to(torch.bfloat16)
    if cutting.do_rescale:
        values = values * cutting.rescale_factor
    if cutting.do_normalize:
        mean, std = (
            torch.tensor(list(three), dtype=torch.bfloat16) for three in (cutting.image_mean, cutting.image_std)
        )
        values = (values - mean[:, None, None]) / std[:, None, None]
    return values
