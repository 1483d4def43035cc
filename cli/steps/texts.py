"""Text that commands run through a model: the user's files, or the sample that ships with the package."""

from importlib.resources import files
from pathlib import Path

from quant.errors import InputError


def read_text(path: Path) -> str:
    """The text of ``path``. Raises InputError if it cannot be read as UTF-8 text."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#x}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def sample_text() -> str:
    """Python modules that no demo model has seen: some 100 kB of code and prose."""
    return files("recipes").joinpath("demo", "held_out.txt").read_text(encoding="utf-8")
