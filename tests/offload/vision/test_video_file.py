"""A video as pictures: the right ones at the right times, and one line for what is none."""

import random
import sys
from pathlib import Path

import pytest

from offload.vision.video_file import MOST_FRAMES, Video, sample_frames
from quant.errors import ColdstreamError, InputError, UsageError
from tests import images

SUFFIXES = ("mp4", "mkv", "avi")


@pytest.fixture(scope="module", params=SUFFIXES)
def film(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images.make_video(tmp_path_factory.mktemp("film") / f"film.{request.param}")


def test_pictures_are_those_of_the_middle_of_each_stretch(film: Path) -> None:
    found = sample_frames(film, 6, 336)
    assert [round(frame.seconds, 1) for frame in found] == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5]
    assert [frame.clock for frame in found][-1] == "0:05"
    for frame in found:
        red, green, _ = frame.image.getpixel((20, 20))
        assert abs(red - 40 * frame.seconds) < 12 and abs(green - 255 + 40 * frame.seconds) < 12


def test_a_short_video_has_each_picture_once_and_none_is_larger_than_a_tile(film: Path) -> None:
    found = sample_frames(film, MOST_FRAMES, 32)
    assert len(found) == 60 and len({frame.seconds for frame in found}) == 60
    assert found[0].image.size == (32, 24)


def test_a_video_is_read_again_when_it_changed(tmp_path: Path) -> None:
    path = images.make_video(tmp_path / "v.mp4")
    before = Video(path, 4).sampled(336)
    assert Video(path, 4).sampled(336) is before
    images.make_video(path, seconds=2)
    assert [frame.seconds for frame in Video(path, 4).sampled(336)] == [0.2, 0.7, 1.2, 1.7]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("none.mp4", None),
        ("empty.mp4", b""),
        ("text.mp4", b"no film at all\n" * 50),
        ("list.m3u8", b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfilm.mp4\n#EXT-X-ENDLIST\n"),
        ("list.mp4", b"ffconcat version 1.0\nfile film.mp4\n"),
        ("image.png", "picture"),
    ],
)
def test_what_is_no_video_is_one_line(name: str, content: bytes | str | None, tmp_path: Path) -> None:
    images.make_video(tmp_path / "film.mp4")
    if content == "picture":
        images.picture(30, 30).save(tmp_path / name)
    elif isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        sample_frames(tmp_path / name, 4, 336)


def test_a_folder_and_numbers_of_pictures_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no file"):
        sample_frames(tmp_path, 4, 336)
    for frames in (0, MOST_FRAMES + 1):
        with pytest.raises(UsageError, match="expected 1 to 128"):
            Video(tmp_path, frames)


def test_damaged_videos_give_pictures_or_one_line(film: Path, tmp_path: Path) -> None:
    whole, chance, said = film.read_bytes(), random.Random(7), list[str]()
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 3, 20, 200))):
            data[chance.randrange(len(data))] = chance.randrange(256)
        if chance.random() < 0.3:
            del data[chance.randrange(len(data)) :]
        (tmp_path / "damaged").write_bytes(data)
        try:
            found = len(sample_frames(tmp_path / "damaged", 3, 336))
        except InputError as error:
            said.append(str(error))
        else:
            assert 1 <= found <= 3
    assert said and not any("\n" in line or "damaged" not in line for line in said)


def test_without_the_library_it_is_said_what_to_install(film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ColdstreamError, match=r"coldstream\[video\]"):
        sample_frames(film, 4, 336)
