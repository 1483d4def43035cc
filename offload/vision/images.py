"""Images: what a session needs to look at pictures, in one object."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from offload.text.tokenizer import chat_text
from offload.vision.image_file import ImageSource, open_image
from offload.vision.image_tokens import ImageEmbedding, ImageTokens
from offload.vision.processor import PLACEHOLDER, ImageProcessor, around_places
from offload.vision.tower import VisionTower
from offload.vision.video_file import Video
from quant.checkpoint.checkpoint import Checkpoint
from quant.errors import UsageError
from quant.model.shape import ModelShape

Message = Mapping[str, Any]
Shown = ImageSource | Video


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

    def encode(self, text: str, sources: Sequence[Shown], *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text`` with images and videos. A text without places for them (PLACEHOLDER) has them before
        it. A video becomes its pictures, each after its time.

        Raises InputError for a file that is no image or video, and for places that do not match them.
        """
        if PLACEHOLDER not in text:
            text = PLACEHOLDER * len(sources) + text
        text, pictures = self._with_frames(text, sources)
        images = [open_image(source, f"image {index}") for index, source in enumerate(pictures, 1)]
        ids, pixels = self._processor.encode(text, images, add_special_tokens=add_special_tokens)
        places = [place for found in self.tokens.add(pixels, self._processor.rows_per_tile) for place in found]
        rows = iter(places)
        return [next(rows) if token == self._processor.image_token else token for token in ids]

    def _with_frames(self, text: str, sources: Sequence[Shown]) -> tuple[str, list[ImageSource]]:
        """``text`` with a line for each picture of a video in its place, and all pictures."""
        parts = around_places(text, len(sources))
        told, pictures = parts[0], list[ImageSource]()
        for source, part in zip(sources, parts[1:], strict=True):
            if isinstance(source, Video):
                frames = source.sampled(self._processor.tile_side)
                told += "".join(f"{frame.clock} {PLACEHOLDER}\n" for frame in frames)
                pictures += [frame.image for frame in frames]
            else:
                told += PLACEHOLDER
                pictures.append(source)
            told += part
        return told, pictures

    def encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        switches: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation whose contents may be lists of parts: ``{"type": "text", "text": …}``,
        ``{"type": "image", "image": …}`` with a path, a file's bytes or an image of Pillow's, and
        ``{"type": "video", "video": …}`` with a path or a Video. ``tools`` and ``switches`` as in
        ``tokenizer.encode_chat``."""
        told, sources = without_images(messages)
        return self.encode(chat_text(self._tokenizer, told, tools, switches), sources, add_special_tokens=False)


def has_images(messages: Sequence[Message]) -> bool:
    """Whether a part of a message is an image or a video."""
    return any(_source(part) is not None for message in messages for part in _parts(message))


def without_images(messages: Sequence[Message]) -> tuple[list[Message], list[Shown]]:
    """``messages`` as a chat template takes them, and the images and videos in their order. To a template both are
    images: none of Llama 4 knows videos."""
    told: list[Message] = []
    sources: list[Shown] = []
    for message in messages:
        plain: list[Mapping[str, Any]] = []
        for part in _parts(message):
            source = _source(part)
            plain.append(part if source is None else {"type": "image"})
            sources += [] if source is None else [source]
        told.append({**message, "content": plain} if plain else message)
    return told, sources


def _parts(message: Message) -> list[Mapping[str, Any]]:
    content = message.get("content")
    return content if isinstance(content, list) else []


def _source(part: Mapping[str, Any]) -> Shown | None:
    """What a part shows; None for one of text."""
    kind = part.get("type")
    if kind not in ("image", "video"):
        return None
    if kind not in part:
        raise UsageError(f"a message has a part of type '{kind}' without '{kind}': expected what is to be shown")
    shown: Shown = part[kind]
    return Video(Path(shown)) if kind == "video" and isinstance(shown, str | Path) else shown
