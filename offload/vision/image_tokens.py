"""Images as tokens: each row that an image becomes has an id of its own, beyond the vocabulary.

The language model sees an image as a run of rows in place of embeddings. As ids, these rows go through everything
that is made for tokens: the part of a prompt that the KV cache holds already is found by comparing ids, and two
images never compare as equal, since the same pixels get the same ids again and others never do.

Legend: S side of a tile in pixels, T tiles, H hidden size.
"""

import hashlib
import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offload.plan.footprint import IMAGE_TILES, ROW_TILES
from quant.errors import InputError, UsageError


@dataclass
class _Image:
    first: int
    count: int
    digest: str
    pixels: Tensor | None = None
    rows: Tensor | None = None

    @property
    def tiles(self) -> int:
        return 0 if self.pixels is None else len(self.pixels)


class ImageTokens:
    """The images of a session. ``first_id`` is the size of the vocabulary; ``encode`` makes an image's rows ``[n, H]``
    of its pixels (VisionTower.encode), once they are needed.

    Pixels of IMAGE_TILES tiles are kept, those seen last, and the rows of two large images: each prompt brings
    the pixels of all its images, and most rows are in the KV cache by then.
    """

    def __init__(self, first_id: int, encode: Callable[[Tensor], Tensor]) -> None:
        self.first_id = self.end = first_id
        self._encode = encode
        self._by_hash: dict[str, _Image] = {}  # the latest last
        self._starts: list[int] = []
        self._images: list[_Image] = []
        self._lock = threading.Lock()  # a server reads prompts while others run

    def add(self, images: Sequence[Tensor], rows_per_tile: int) -> list[range]:
        """The ids of the images of one prompt, each given by its pixels ``[T, 3, S, S]``: those that it had before,
        or new ones. Raises InputError if they have more tiles than are kept."""
        tiles = sum(map(len, images))
        if tiles > IMAGE_TILES:
            raise InputError(
                f"the images of this prompt have {tiles:,} tiles: expected at most {IMAGE_TILES}; give fewer or "
                "smaller ones"
            )
        with self._lock:
            return [self._add(pixels, rows_per_tile * len(pixels)) for pixels in images]

    def _add(self, pixels: Tensor, count: int) -> range:
        digest = hashlib.sha256(pixels.contiguous().view(torch.uint8).numpy().data).hexdigest()
        image = self._by_hash.pop(digest, None)
        if image is None:
            image = _Image(self.end, count, digest)
            self.end += count
            self._starts.append(image.first)
            self._images.append(image)
        image.pixels = pixels
        self._by_hash[digest] = image
        kept = 0
        for other in reversed(self._by_hash.values()):
            kept += other.tiles
            if kept > IMAGE_TILES:
                other.pixels = None
        return range(image.first, image.first + image.count)

    def content(self, token: int) -> tuple[bytes, int]:
        """A hash of the pixels of the image that ``token`` is a row of, and which row."""
        with self._lock:
            image = self._images[bisect_right(self._starts, token) - 1]
            return bytes.fromhex(image.digest), token - image.first

    def rows(self, ids: Tensor) -> Tensor:
        """What stands for image tokens ``ids`` ``[n]``: ``[n, H]``.

        Raises UsageError for an image whose pixels had to give way to those of later prompts.
        """
        with self._lock:
            images = [self._images[bisect_right(self._starts, token) - 1] for token in ids.tolist()]
            return torch.stack(
                [self._rows(image)[token - image.first] for image, token in zip(images, ids.tolist(), strict=True)]
            )

    def _rows(self, image: _Image) -> Tensor:
        if image.rows is None:
            if image.pixels is None:
                raise UsageError(
                    "an image of this prompt gave way to those of later ones before it was read: ask again"
                )
            kept = sum(other.count for other in self._images if other.rows is not None) + image.count
            for other in self._images:  # the oldest first
                if other.rows is not None and kept > 2 * ROW_TILES * image.count // image.tiles:
                    kept, other.rows = kept - other.count, None
            image.rows = self._encode(image.pixels)
        return image.rows


class ImageEmbedding(nn.Module):
    """The model's ``embedding``, which knows image tokens besides those of the vocabulary."""

    def __init__(self, embedding: nn.Module, images: ImageTokens) -> None:
        super().__init__()
        self.embedding, self.images = embedding, images

    @property
    def weight(self) -> Tensor:
        """The embedding's ``[V, H]``."""
        weight: Tensor = self.embedding.weight  # type: ignore[assignment]
        return weight

    def forward(self, ids: Tensor) -> Tensor:
        """ids ``[...]`` → ``[..., H]``."""
        images = self.images
        if images.end == images.first_id:  # none yet: nothing is looked at, on a GPU nothing waited for
            return self.embedding(ids)  # type: ignore[no-any-return]
        is_image = ids >= images.first_id
        rows: Tensor = self.embedding(ids.masked_fill(is_image, 0))
        if is_image.any():
            rows = rows.clone()
            rows[is_image] = images.rows(ids[is_image]).to(rows)
        return rows
