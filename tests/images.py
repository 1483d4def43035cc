"""A tiny multimodal Llama 4 with its processor, and pictures of every awkward kind."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from transformers import AutoTokenizer

from tests import checkpoints

SPECIAL = ("<|image_start|>", "<|image_end|>", "<|image|>", "<|patch|>", "<|tile_x_separator|>", "<|tile_y_separator|>")
VOCABULARY = 272
CUTTING = {"size": {"height": 28, "width": 28}, "max_patches": 6, "image_processor_type": "Llama4ImageProcessor"}
_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<|image|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


def make_model(folder: Path, **overrides: object) -> Path:
    """Save a random model with a vision tower of tiles of 28 × 28 pixels, four rows each, and all its files."""

    checkpoints.make("llama4", folder, vocab_size=VOCABULARY, **overrides)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(CUTTING))
    (folder / "processor_config.json").write_text(json.dumps({"patch_size": 7, "processor_class": "Llama4Processor"}))
    config = json.loads((folder / "config.json").read_text())
    for key, token in (
        ("image_token_index", "<|patch|>"),
        ("boi_token_index", SPECIAL[0]),
        ("eoi_token_index", SPECIAL[1]),
    ):
        config[key] = tokenizer.convert_tokens_to_ids(token)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Noise with a disc in it."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    ImageDraw.Draw(image).ellipse((0, 0, width // 2, height // 2), fill=(200, 30, 90))
    return image.convert(mode)


def _rotated(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(40, 20).save(path, exif=exif)


def _animated(path: Path) -> None:
    picture(30, 30).save(path, save_all=True, append_images=[picture(30, 30, seed=1)])


def _transparent(path: Path) -> None:
    image = picture(33, 50, "RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    image.save(path)


# By file name: writes an image of that kind.
KINDS: dict[str, Callable[[Path], None]] = {
    "plain.png": lambda path: picture(28, 28).save(path),
    "one_pixel.png": lambda path: picture(1, 1).save(path),
    "wide.jpg": lambda path: picture(300, 20).save(path),
    "tall.webp": lambda path: picture(17, 190).save(path),
    "odd.bmp": lambda path: picture(61, 47).save(path),
    "grey.png": lambda path: picture(50, 40, "L").save(path),
    "palette.png": lambda path: picture(50, 40, "P").save(path),
    "alpha.png": _transparent,
    "cmyk.jpg": lambda path: picture(40, 40, "CMYK").save(path),
    "bits.tiff": lambda path: picture(64, 32, "1").save(path),
    "rotated.jpg": _rotated,
    "animated.gif": _animated,
}


def make_video(path: Path, seconds: int = 6, rate: int = 10) -> Path:
    """A film of ``rate`` pictures a second whose red is ``4 · index`` and whose green is what is left."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(seconds * rate):
            pixels = np.empty((48, 64, 3), np.uint8)
            pixels[...] = (4 * index % 256, 255 - 4 * index % 256, 128)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
