"""Text that commands run through a model: the user's files, or the sample that ships with the package."""

import sys
from importlib.resources import files
from pathlib import Path
from typing import BinaryIO

from quant.errors import InputError
from quant.input_file import read_bytes
from quant.sizes import format_size

_OWN_FILES = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")
_MOST_BYTES = 2**30


def read_text(path: Path) -> str:
    """The text of ``path``, which is - for stdin, whatever it is if it is one of this process's own open files
    (``/dev/stdin``, or what a shell's ``<(command)`` gives). Raises InputError if it cannot be read as UTF-8 text,
    or is larger than 1 GiB.
    """
    try:
        if str(path) == "-":
            return decoded(_all_of(sys.stdin.buffer, "stdin"), "stdin")
        if str(path).startswith(_OWN_FILES):
            with path.open("rb") as file:
                return decoded(_all_of(file, str(path)), str(path))
        return decoded(read_bytes(path, InputError, _MOST_BYTES), str(path))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def decoded(data: bytes, name: str) -> str:
    """``data``, which came from ``name``, as text with line feeds. Raises InputError if it is not UTF-8."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text: byte {error.start} is {data[error.start]:#x}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _all_of(file: BinaryIO, name: str) -> bytes:
    data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise InputError(f"{name} is larger than {format_size(_MOST_BYTES)}: give less text")
    return data


def sample_text() -> str:
    """Python modules that no demo model has seen: some 100 kB of code and prose."""
    return files("recipes").joinpath("demo", "held_out.txt").read_text(encoding="utf-8")
