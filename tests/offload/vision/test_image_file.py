"""Files that are no images, or would take more than there is: one clear line each."""

import io
import struct
import zlib
from contextlib import suppress
from pathlib import Path

import pytest

from offload.vision.image_file import open_image
from quant.errors import InputError
from tests import images


def _png(width: int, height: int) -> bytes:
    """A PNG whose header promises so many pixels, and has next to none."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = (header, b"IDAT" + zlib.compress(bytes(10)))
    written = (struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


def test_every_kind_is_upright_rgb(tmp_path: Path) -> None:
    for name, make in images.KINDS.items():
        make(tmp_path / name)
        assert open_image(tmp_path / name).mode == "RGB"
    assert open_image(tmp_path / "rotated.jpg").size == (20, 40)
    assert open_image((tmp_path / "plain.png").read_bytes()).size == (28, 28)
    assert open_image(images.picture(5, 5, "RGBA")).mode == "RGB"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "no image that can be read"),
        (b"hello", "no image that can be read"),
        (b"%PDF-1.7", "no image that can be read"),
        (_png(60_000, 60_000), "too large"),
        (_png(9_000, 9_000), "too large: .*found 9,000 × 9,000"),
        (_png(10, 10), "broken image"),
    ],
)
def test_what_is_no_image_is_said(data: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    file.write_bytes(data)
    with pytest.raises(InputError, match=f"picture.png is .*{said}"):
        open_image(file)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_file_that_is_cut_off_anywhere_is_refused_or_as_it_was(form: str) -> None:
    whole = io.BytesIO()
    images.picture(40, 30).save(whole, form)
    data = whole.getvalue()
    for end in range(0, len(data), max(1, len(data) // 60)):
        size = (40, 30)
        with suppress(InputError):
            size = open_image(data[:end], "x").size
        assert size == (40, 30)


def test_a_path_that_is_no_file_is_said(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.png", Path("/dev/zero")):
        with pytest.raises(InputError):
            open_image(path)
