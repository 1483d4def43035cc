"""A file that somebody else wrote, read whole: a regular file, of bounded size, parsed strictly, checked
against a record of what must be in it.

Every JSON that is read comes through here, so that a name given twice, ``Infinity``, nesting without end, a
pipe in place of a file or a list in place of an object is one clear line wherever it stands. What the values
must be is a pydantic model; ``validated`` says of the first value that is wrong what was found and expected.
"""

import errno
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from quant.errors import CheckpointError, ColdstreamError

TEXT_BYTES = 64 * 2**20  # of a config or another description; the largest in public are some 10 MiB
_DEPTH = 32
_SHOWN = 60
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
# A character outside Unicode's planes that was written as half of an escaped pair: no such text can be printed.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
Record = TypeVar("Record", bound=BaseModel)
Checked = TypeVar("Checked")


def kind_of(path: Path) -> str | None:
    """What lies at ``path`` if it is no regular file: ``"a directory"``, ``"a named pipe"`` …; None if it is
    one. Links are followed. Raises OSError as ``os.stat`` does."""
    mode = path.stat().st_mode
    return None if stat.S_ISREG(mode) else next((name for test, name in _KINDS if test(mode)), "no file")


def is_there(path: Path | str) -> bool:
    """Whether anything lies at ``path``, a link to nothing, too.

    Raises OSError where that cannot be told: what cannot be looked at is not absent, as os.path would have it.
    """
    return _mode(path, follow_symlinks=False) is not None


def is_file(path: Path | str) -> bool:
    """Whether ``path`` leads to a regular file. Raises OSError as ``is_there`` does."""
    mode = _mode(path)
    return mode is not None and stat.S_ISREG(mode)


def _mode(path: Path | str, *, follow_symlinks: bool = True) -> int | None:
    try:
        return os.stat(path, follow_symlinks=follow_symlinks).st_mode
    except ValueError:  # no name that a file can have
        return None
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise


def open_regular(path: Path, error: type[ColdstreamError] = CheckpointError) -> int:
    """A descriptor of the regular file ``path``, for reading. Never waits, as opening a pipe would.

    Raises ``error`` if there is no such file, or it is something else.
    """
    try:
        kind = kind_of(path)  # before it is opened: opening a device can do something
        if kind is None:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                return descriptor
            os.close(descriptor)
            kind = "no file any more"
    except (OSError, ValueError) as cause:
        raise error(f"{path} {why_unreadable(path, cause)}") from None
    raise error(f"{path} is {kind}: expected a file")


@contextmanager
def opened(path: Path, error: type[ColdstreamError] = CheckpointError) -> Iterator[int]:
    """``open_regular`` as a context; what fails while it is open raises ``error``, too."""
    descriptor = open_regular(path, error)
    try:
        yield descriptor
    except OSError as cause:
        raise error(f"{path} {why_unreadable(path, cause)}") from None
    finally:
        os.close(descriptor)


def why_unreadable(path: Path, cause: Exception) -> str:
    """The predicate of a sentence about ``path`` that says why ``cause`` kept it from being read."""
    if not isinstance(cause, OSError):
        return "is no name that a file can have"  # a NUL byte in it
    if isinstance(cause, FileNotFoundError) and path.is_symlink():
        return f"is a link to {os.readlink(path)}, which is not there: the download is not whole"
    if cause.errno == errno.ENOENT:
        return "is missing"
    if cause.errno == errno.ELOOP:
        return "is a link to itself"
    if cause.errno in (errno.EMFILE, errno.ENFILE):
        return f"cannot be opened: {cause.strerror}; raise the limit with `ulimit -n`"
    return f"cannot be read: {cause.strerror}"


def read_bytes(path: Path, error: type[ColdstreamError] = CheckpointError, limit: int = TEXT_BYTES) -> bytes:
    """What ``path`` holds. Raises ``error`` if it is no regular file or has more than ``limit`` bytes."""
    with opened(path, error) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise error(f"{path} has {size:,} bytes: expected at most {limit:,}")
        with os.fdopen(os.dup(descriptor), "rb") as stream:
            data = stream.read(limit + 1)  # what says that it has no bytes may give some all the same
    if len(data) > limit:
        raise error(f"{path} has more than {limit:,} bytes: expected no more")
    return data


def read_json(path: Path, error: type[ColdstreamError] = CheckpointError, limit: int = TEXT_BYTES) -> Any:
    """The JSON value in ``path``, read strictly. Raises ``error``."""
    return parse_json(read_bytes(path, error, limit), str(path), error)


def read_object(
    path: Path, what: str, error: type[ColdstreamError] = CheckpointError, limit: int = TEXT_BYTES
) -> dict[str, Any]:
    """The JSON object in ``path``; ``what`` is what it should be. Raises ``error``."""
    value = read_json(path, error, limit)
    if not isinstance(value, dict):
        raise error(f"{path} is no JSON object: expected {what}")
    return value


def parse_json(data: bytes, name: str, error: type[ColdstreamError] = CheckpointError) -> Any:
    """The JSON value of ``data``, UTF-8, which ``name`` is called in what is raised.

    Raises ``error`` for what is no JSON by the letter (``NaN``, ``Infinity``, a number beyond a double's
    range) and for what programs would read differently: a key twice in an object, half a surrogate pair, more
    than some thirty levels of nesting.
    """
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_finite
        )
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()
        _check_depth(value)
    except RecursionError:
        raise error(f"{name} cannot be read as JSON: it is nested without end") from None
    except ValueError as cause:
        raise error(f"{name} cannot be read as JSON: {_reason(cause)}") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"it has {short(twice)} twice in one object")
    return made


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:_SHOWN]} is too large")
    return value


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {_DEPTH} levels")


def _reason(cause: ValueError) -> str:
    if isinstance(cause, UnicodeDecodeError):
        return f"byte {cause.start} is not UTF-8"
    if isinstance(cause, UnicodeEncodeError):
        return "a character is half of a surrogate pair"
    return str(cause)


def validated(
    kind: type[Record] | TypeAdapter[Checked], value: object, name: str, error: type[ColdstreamError] = CheckpointError
) -> Any:
    """``value`` as a record of ``kind``. Raises ``error`` that names the first value that is wrong."""
    try:
        return kind.validate_python(value) if isinstance(kind, TypeAdapter) else kind.model_validate(value)
    except ValidationError as cause:
        said = wrong_value(cause)
        raise error(f"{name} {said}" if said.startswith("has no ") else f"{name}: {said}") from None


def wrong_value(cause: ValidationError) -> str:
    """The first value that ``cause`` complains about, in words: where it stands, what it is, what it should be."""
    first = cause.errors(include_url=False, include_context=False)[0]
    where, said = ".".join(str(part) for part in first["loc"]), first["msg"]
    expected = said.removeprefix("Input should be ").removeprefix("Value error, ")
    if first["type"] == "missing":
        inside = f" in {'.'.join(str(part) for part in first['loc'][:-1])}" if len(first["loc"]) > 1 else ""
        return f"has no {first['loc'][-1]!r}{inside}"
    if first["type"] == "extra_forbidden":
        return f"unknown key {where}"
    if first["type"] == "value_error":
        return f"{where} {expected}".strip()
    if first["type"] in ("model_type", "dict_type"):
        expected = "an object"
    return f"{where or 'it'} is {short(first['input'])}: expected {expected}"


def short(value: object) -> str:
    """``value`` as Python writes it, cut to what a line has room for."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
