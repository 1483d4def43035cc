"""Video files as a few still pictures with the times they are from, which is how a model of images sees a film.

PyAV (FFmpeg's libraries) reads them; it is an optional part, ``pip install coldstream[video]``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from quant.errors import InputError, UsageError

_MOST_PIXELS = 10_000_000  # 4096 × 2304 and a little: a decoder keeps some twenty such pictures, 0.3 GB
MOST_FRAMES = 128  # a picture of one tile each, of the 136 tiles that a prompt may have
# Containers that hold their own data: of playlists and lists of files, FFmpeg would open what they name.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,mpeg,mpegts,mpegvideo,ogg,asf,m4v,h264,hevc,gif"
_OPTIONS = {"format_whitelist": _CONTAINERS}
_RATE_UNKNOWN = 25.0
FRAMES = 32
TILE_SIDE = 336  # Llama 4's; a model's own files say it


@dataclass(frozen=True)
class Video:
    """A video to be shown as at most ``frames`` pictures. Raises UsageError for less than one, or more than 128."""

    path: Path
    frames: int = FRAMES

    def __post_init__(self) -> None:
        if not 1 <= self.frames <= MOST_FRAMES:
            raise UsageError(f"a video as {self.frames:,} pictures: expected 1 to {MOST_FRAMES}")

    def sampled(self, side: int) -> tuple["Frame", ...]:
        """See ``sample_frames``; the file is not read again as long as it does not change."""
        try:
            found = self.path.stat()
        except (OSError, ValueError) as error:
            raise InputError(f"{self.path} cannot be read: {_reason(error)}") from None
        return _sampled_once(self.path, (found.st_ino, found.st_size, found.st_mtime_ns), self.frames, side)


@dataclass(frozen=True)
class Frame:
    """One picture of a video, and its time from the beginning in seconds."""

    seconds: float
    image: Image.Image

    @property
    def clock(self) -> str:
        """``1:05`` or ``1:02:03``."""
        minutes, seconds = divmod(int(self.seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def sample_frames(path: Path, count: int, side: int) -> list[Frame]:
    """At most ``count`` pictures of the video ``path`` at even distances, the middle of each stretch, reduced to fit
    ``side`` × ``side`` pixels.

    Raises InputError for a file that cannot be read, is no video of a common kind, is broken, or has more than
    ten million pixels a picture; UsageError where PyAV is not installed.
    """
    av = _library()
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path} is no file: expected a video")
        # As a file, not a name: a name could be an address.
        with path.open("rb") as file, av.open(file, options=_OPTIONS, metadata_errors="replace") as container:
            found = list(_sampled(container, path, count, side))
    except av.error.FFmpegError as error:  # some of them are OSErrors, too
        raise InputError(f"{path} cannot be read as a video: {_reason(error)}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {_reason(error)}") from None
    except (ValueError, MemoryError, ArithmeticError) as error:
        raise InputError(f"{path} is a broken video: {_reason(error)}") from None
    if not found:
        raise InputError(f"{path} has no picture that can be read: expected a video")
    return found


@lru_cache(maxsize=2)  # each turn of a conversation tells all its videos again
def _sampled_once(path: Path, identity: tuple[int, ...], count: int, side: int) -> tuple[Frame, ...]:
    return tuple(sample_frames(path, count, side))


def _sampled(container: Any, path: Path, count: int, side: int) -> Iterator[Frame]:
    if not container.streams.video:
        raise InputError(f"{path} has no pictures, only {_kinds(container)}: expected a video")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise InputError(f"{path} has pictures in a coding that FFmpeg does not know: expected a common video")
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > _MOST_PIXELS:
        raise InputError(f"{path} is too large: expected at most {_MOST_PIXELS:,} pixels, found {width:,} × {height:,}")
    stream.thread_type = "NONE"  # pictures one by one, no threads that a budget does not know
    duration = _duration(container, stream)
    if duration is None:
        yield from _every(container, stream, count, side)
        return
    begins, base = float((stream.start_time or 0) * stream.time_base), stream.time_base
    last = -1.0
    for index in range(count):
        wanted = begins + duration * (index + 0.5) / count
        container.seek(int(wanted / base), stream=stream)
        frame = _at(container, stream, wanted)
        if frame is not None and frame.time is not None and frame.time > last:  # a short video has fewer
            last = frame.time
            yield Frame(max(last - begins, 0.0), _reduced(frame, side))


def _at(container: Any, stream: Any, wanted: float) -> Any:
    """The picture that is shown at ``wanted`` seconds: the last one that is not later, or the first there is."""
    shown = None
    for frame in container.decode(stream):
        if frame.time is None or (frame.time > wanted and shown is not None):
            break
        shown = frame
        if frame.time > wanted:
            break
    return shown


def _every(container: Any, stream: Any, count: int, side: int) -> Iterator[Frame]:
    """Of a video that does not say how long it is: all pictures are looked at, and of twice as many as are wanted every
    second is dropped, again and again."""
    kept: list[Frame] = []
    step = 1
    for index, frame in enumerate(container.decode(stream)):
        if index % step:
            continue
        seconds = index / _RATE_UNKNOWN if frame.time is None else frame.time
        kept.append(Frame(seconds, _reduced(frame, side)))
        if len(kept) >= 2 * count:
            kept, step = kept[::2], 2 * step
    distance = len(kept) / min(count, len(kept)) if kept else 1
    yield from (kept[int((index + 0.5) * distance)] for index in range(min(count, len(kept))))


def _duration(container: Any, stream: Any) -> float | None:
    """Seconds, as the file says; None if it does not."""
    if stream.duration is not None and stream.duration > 0:
        return float(stream.duration * stream.time_base)
    return container.duration / 1e6 if container.duration and container.duration > 0 else None


def _reduced(frame: Any, side: int) -> Image.Image:
    image: Image.Image = frame.to_image()
    turned = getattr(frame, "rotation", 0) or 0
    if turned % 360:
        image = image.rotate(turned, expand=True)
    image.thumbnail((side, side))
    return image.convert("RGB")


def _kinds(container: Any) -> str:
    return ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"


def _reason(error: Exception) -> str:
    said = getattr(error, "strerror", None) or str(error)
    return " ".join(said.split()) or type(error).__name__


def _library() -> Any:
    try:
        import av
        import av.logging
    except ImportError:
        raise UsageError(
            "videos are read by PyAV, which is not installed: pip install 'coldstream[video]', or give pictures of "
            "the video as images"
        ) from None
    av.logging.set_level(None)  # FFmpeg's own lines on stderr
    return av
