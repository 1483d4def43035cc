"""A file that somebody else wrote is read strictly, or refused in one line; whatever lies there."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from quant.errors import CheckpointError, ProfileError
from quant.input_file import kind_of, parse_json, read_bytes, read_json, read_object, validated
from tests import hostile


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "a": 2}', "has 'a' twice in one object"),
        ('{"b": {"a": 1, "c": 0, "a": 1}}', "has 'a' twice in one object"),
        ('{"a": NaN}', "NaN is no JSON"),
        ('{"a": -Infinity}', "-Infinity is no JSON"),
        ('{"a": 1e999}', "the number 1e999 is too large"),
        ('{"a": ' + "9" * 5000 + "}", "cannot be read as JSON"),
        ("[" * 100 + "]" * 100, "nested deeper than 32 levels"),
        ("[" * 100_000, "nested without end"),
        ('{"a": "\\ud83d"}', "half of a surrogate pair"),
        ("\ufeff{}", "cannot be read as JSON"),
        ("", "cannot be read as JSON"),
        ('{"a": 1', "cannot be read as JSON"),
        ("{} x", "cannot be read as JSON"),
    ],
)
def test_what_programs_would_read_differently_is_refused(text: str, said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as caught:
        parse_json(text.encode(), "it")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_bytes_that_are_no_utf8_are_refused() -> None:
    with pytest.raises(CheckpointError, match="byte 6 is not UTF-8"):
        parse_json(b'{"a": \xff}', "it")


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    # What json.dumps escapes is a pair of surrogates, or one alone.
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@given(VALUES)
def test_json_by_the_letter_is_read_as_json_reads_it(value: object) -> None:
    assert parse_json(json.dumps(value).encode(), "it") == value


@given(st.binary(max_size=40) | st.text('[]{}:,"\\u0aefdE-+. ', max_size=40).map(str.encode))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    hostile.refusal(lambda: parse_json(data, "it"))


def test_what_is_no_file_is_called_by_its_name(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("blobs/0123")
    (tmp_path / "loop").symlink_to("loop")
    for path, said in {
        tmp_path: "is a directory: expected a file",
        tmp_path / "pipe": "is a named pipe: expected a file",
        Path("/dev/zero"): "is a device: expected a file",
        tmp_path / "gone": "gone is missing",
        tmp_path / "link": "is a link to blobs/0123, which is not there",
        tmp_path / "loop": "is a link to itself",
        tmp_path / ("x" * 300): "cannot be read: File name too long",
        tmp_path / "a\x00b": "is no name that a file can have",
    }.items():
        with pytest.raises(CheckpointError, match=said):
            read_bytes(path)
    assert kind_of(tmp_path) == "a directory"


def test_more_bytes_than_the_limit_are_not_read(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(CheckpointError, match="has 1,099,511,627,776 bytes: expected at most 100"):
        read_bytes(tmp_path / "large", limit=100)
    with pytest.raises(CheckpointError, match="has more than 10 bytes"):  # it says that it has none
        read_bytes(Path("/proc/self/status"), limit=10)


def test_the_error_is_of_the_kind_that_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("[]")
    with pytest.raises(ProfileError, match="is no JSON object: expected a profile"):
        read_object(tmp_path / "list", "a profile", ProfileError)
    with pytest.raises(ProfileError, match="is missing"):
        read_json(tmp_path / "gone", ProfileError)


class Point(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    x: int
    y: list[float]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"x": 1}, "it has no 'y'"),
        ({"x": "1", "y": []}, "it: x is '1': expected a valid integer"),
        ({"x": 1, "y": [0.5, None]}, "it: y.1 is None: expected a valid number"),
        ({"x": 1, "y": [], "z": 0}, "it: unknown key z"),
        ([], "it: it is []: expected an object"),
    ],
)
def test_the_first_wrong_value_is_named(value: object, said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        validated(Point, value, "it")
    assert str(caught.value) == said
