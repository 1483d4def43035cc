"""Images: what a session needs to look at pictures, in one object."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from offload.text.tokenizer import chat_text
from offload.vision.image_file import ImageSource, open_image
from offload.vision.image_tokens import ImageEmbedding, ImageTokens
from offload.vision.processor import PLACEHOLDER, ImageProcessor
from offload.vision.tower import VisionTower
from quant.checkpoint.checkpoint import Checkpoint
from quant.errors import UsageError
from quant.model.shape import ModelShape

Message = Mapping[str, Any]


def check_looking(shape: ModelShape, *, room: bool) -> None:
    """Raises UsageError where no images can be looked at: by what the model is, or as memory has no ``room`` for it."""
    if not shape.reads_images:
        raise UsageError("images were given, and this model reads text only here: expected a Llama 4 that sees")
    if not room:
        raise UsageError(
            "images were given, and this run kept no room for them: expected a chat or server without --no-images, a "
            "session with images=True"
        )


class Images:
    """The pictures of one session on ``model``, whose embedding is told of them.

    Raises CheckpointError if the checkpoint lacks a vision tower or the files that say how images are cut.
    """

    def __init__(
        self, checkpoint: Checkpoint, model: Any, tokenizer: Any, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._tokenizer = tokenizer
        self._processor = ImageProcessor(checkpoint, tokenizer)
        self.tokens = ImageTokens(checkpoint.shape.vocab_size, VisionTower(checkpoint, device, dtype).encode)
        model.set_input_embeddings(ImageEmbedding(model.get_input_embeddings(), self.tokens))

    def encode(self, text: str, sources: Sequence[ImageSource], *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text`` with images. A text without places for them (PLACEHOLDER) has them before it.

        Raises InputError for a file that is no image, and for places that do not match the images.
        """
        images = [open_image(source, f"image {index}") for index, source in enumerate(sources, 1)]
        if PLACEHOLDER not in text:
            text = PLACEHOLDER * len(images) + text
        ids, pixels = self._processor.encode(text, images, add_special_tokens=add_special_tokens)
        places = [place for found in self.tokens.add(pixels, self._processor.rows_per_tile) for place in found]
        rows = iter(places)
        return [next(rows) if token == self._processor.image_token else token for token in ids]

    def encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        switches: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation whose contents may be lists of parts: ``{"type": "text", "text": …}`` and
        ``{"type": "image", "image": …}`` with a path, a file's bytes or an image of Pillow's. ``tools`` and
        ``switches`` as in ``tokenizer.encode_chat``."""
        told, sources = without_images(messages)
        return self.encode(chat_text(self._tokenizer, told, tools, switches), sources, add_special_tokens=False)


def has_images(messages: Sequence[Message]) -> bool:
    """Whether a part of a message is an image."""
    return any(_is_image(part) for message in messages for part in _parts(message))


def without_images(messages: Sequence[Message]) -> tuple[list[Message], list[ImageSource]]:
    """``messages`` as a chat template takes them, and the images in their order."""
    told: list[Message] = []
    sources: list[ImageSource] = []
    for message in messages:
        parts = _parts(message)
        sources += [part["image"] for part in parts if _is_image(part)]
        plain = [{"type": "image"} if _is_image(part) else part for part in parts]
        told.append({**message, "content": plain} if parts else message)
    return told, sources


def _parts(message: Message) -> list[Mapping[str, Any]]:
    content = message.get("content")
    return content if isinstance(content, list) else []


def _is_image(part: Mapping[str, Any]) -> bool:
    if part.get("type") != "image":
        return False
    if "image" not in part:
        raise UsageError("a message has a part of type 'image' without an 'image': expected a path, bytes or a picture")
    return True
