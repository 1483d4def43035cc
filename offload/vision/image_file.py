"""Image files as RGB pixels, upright, within bounds that a hostile file cannot pass."""

import io
import struct
import warnings
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from quant.errors import InputError
from quant.input_file import read_bytes

MOST_BYTES = 64 * 2**20
MOST_PIXELS = 64_000_000  # 192 MB as RGB; a phone's photo has 12 to 50 million
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, MemoryError)
ImageSource = str | Path | bytes | Image.Image


def open_image(source: ImageSource, name: str = "the image") -> Image.Image:
    """``source``, a file's path or bytes or an image of Pillow's, as RGB: turned upright as its EXIF data says, the
    first picture of several, without its alpha channel. That is what transformers does with an image.

    ``name`` is what bytes are called in an error. Raises InputError for a file that cannot be read, is no image of
    a common format, is broken or cut off, or has more than 64 million pixels.
    """
    if isinstance(source, Image.Image):
        return _upright(source, name)
    if isinstance(source, bytes):
        data = source
    else:
        name, data = str(source), read_bytes(Path(source), limit=MOST_BYTES, error=InputError)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, which are looked at here
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                return _upright(image, name)
    except UnidentifiedImageError:
        raise InputError(f"{name} is no image that can be read: expected PNG, JPEG, WebP, GIF, BMP or TIFF") from None
    except Image.DecompressionBombError:
        raise InputError(_too_large(name)) from None
    except _BROKEN as error:
        raise InputError(_broken(name, error)) from None


def _upright(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise InputError(f"{_too_large(name)}, found {width:,} × {height:,}")
    try:
        return ImageOps.exif_transpose(image).convert("RGB")
    except _BROKEN as error:
        raise InputError(_broken(name, error)) from None


def _broken(name: str, error: Exception) -> str:
    return f"{name} is a broken image: {' '.join(str(error).split()) or type(error).__name__}"


def _too_large(name: str) -> str:
    return f"{name} is too large: expected at most {MOST_PIXELS:,} pixels"
