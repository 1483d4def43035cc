"""Text that commands run through a model: the user's files, or the sample that ships with the package."""

from importlib.resources import files
from pathlib import Path

from quant.errors import InputError
from quant.input_file import read_bytes

_OWN_FILES = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")
_MOST_BYTES = 2**30


def read_text(path: Path) -> str:
    """The text of ``path``, whatever it is if it is one of this process's own open files (``/dev/stdin``, or what a
    shell's ``<(command)`` gives). Raises InputError if it cannot be read as UTF-8 text, or is larger than 1 GiB.
    """
    try:
        own = str(path).startswith(_OWN_FILES)
        data = path.read_bytes() if own else read_bytes(path, InputError, _MOST_BYTES)
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#x}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def sample_text() -> str:
    """Python modules that no demo model has seen: some 100 kB of code and prose."""
    return files("recipes").joinpath("demo", "held_out.txt").read_text(encoding="utf-8")
