"""Foreign data gone wrong, for whatever reads it: values that no reader expects, documents with one thing
changed, safetensors files with an edited header.

What a reader does with any of it is one of two things: right, or one ColdstreamError.
"""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from quant.errors import ColdstreamError

Place = tuple[str | int, ...]
NAN, INFINITY = float("nan"), float("inf")  # json.dumps writes them, though they are no JSON


def nested(depth: int) -> list[Any]:
    """Lists in lists."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


# One of each kind of value that stands where another kind is expected, and numbers out of every range.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, 3, -1, 7, 2**31, 2**63, 10**9, 10**30),
    *(0.0, 1.5, -2.5, 1e-300, 1e300, NAN, INFINITY, -INFINITY),
    *("", "0", "text", "\x00", "a/b", "../x", "é" * 300),
    *([], [None], [0], [-1], [10**9], ["a"], [[]], nested(40), {}, {"a": None}, {"": {}}),
)


def places(value: Any, start: Place = ()) -> Iterator[Place]:
    """Where every value inside ``value`` stands, outer ones first."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*start, key)
        yield from places(inner, (*start, key))


def at(value: Any, place: Place) -> Any:
    """What stands at ``place``."""
    for key in place:
        value = value[key]
    return value


def replaced(value: Any, place: Place, new: Any) -> Any:
    """A copy of ``value`` with ``new`` at ``place``."""
    made = copy.deepcopy(value)
    at(made, place[:-1])[place[-1]] = new
    return made


def without(value: Any, place: Place) -> Any:
    """A copy of ``value`` that lacks what stands at ``place``."""
    made = copy.deepcopy(value)
    del at(made, place[:-1])[place[-1]]
    return made


def changed(value: Any, only: Callable[[Place], bool] = lambda place: True) -> Iterator[tuple[Place, Any]]:
    """``value`` with every one of its places in turn gone, or of every hostile value; each with its place."""
    for place in places(value):
        if only(place):
            yield place, without(value, place)
            for new in VALUES:
                yield place, replaced(value, place, new)


def refusal(read: Callable[[], object]) -> str:
    """What ``read`` is refused with, one line; empty if it is not. Raises whatever else it raises."""
    try:
        read()
    except ColdstreamError as error:
        said = str(error)
    else:
        return ""
    assert said and "\n" not in said, said
    return said


@st.composite
def mutations(draw: st.DrawFn, value: Any, most: int = 3) -> Any:
    """``value`` with up to ``most`` things in it replaced, removed, exchanged or added."""
    for _ in range(draw(st.integers(1, most))):
        found = list(places(value))
        if not found:
            return value
        place = draw(st.sampled_from(found))
        match draw(st.sampled_from(["replace", "remove", "exchange", "nudge", "add"])):
            case "replace":
                value = replaced(value, place, draw(st.sampled_from(VALUES)))
            case "remove":
                value = without(value, place)
            case "exchange":
                value = replaced(value, place, copy.deepcopy(at(value, draw(st.sampled_from(found)))))
            case "nudge":
                number = at(value, place)
                if isinstance(number, int | float) and not isinstance(number, bool):
                    by = draw(st.sampled_from([-1, 1, 2, -number, number, 1 << 32]))
                    value = replaced(value, place, number + by)
            case "add":
                outer = at(value, place)
                if isinstance(outer, dict):
                    value = replaced(
                        value, (*place, draw(st.sampled_from(["x", "", "é"]))), draw(st.sampled_from(VALUES))
                    )
                elif isinstance(outer, list):
                    value = replaced(value, place, [*outer, draw(st.sampled_from(VALUES))])
    return value


def read_safetensors(file: Path) -> tuple[dict[str, Any], bytes]:
    """The header as it stands in ``file``, and the bytes that follow it."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_safetensors(file: Path, header: Any, body: bytes, *, padding: int = 0) -> None:
    """A safetensors file with ``header`` (text, or what json.dumps makes of it), ``padding`` spaces and
    ``body``."""
    text = header if isinstance(header, str) else json.dumps(header)
    raw = text.encode() + b" " * padding
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + body)


def edit_header(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the header of ``file``; ``edit`` changes it in place, or returns another."""
    header, body = read_safetensors(file)
    write_safetensors(file, edit(header) or header, body)


def edit_json(file: Path, edit: Callable[[Any], Any]) -> None:
    """Rewrite a JSON file; ``edit`` changes the value in place, or returns another."""
    value = json.loads(file.read_text())
    made = edit(value)
    file.write_text(json.dumps(value if made is None else made))
