"""Files of tensors that a run keeps for itself or another run: written whole or not at all, each failure one line."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quant.errors import OutputError
from quant.output_file import replacing

UNREADABLE = (OSError, SafetensorError, RuntimeError)  # the last where torch maps the file


def save_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with ``about`` in its header, and wait until it is on disk. Raises OutputError."""
    with replacing(path) as draft:
        try:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, draft, dict(about or {}) or None)
        except SafetensorError as error:
            raise OutputError(f"{path} cannot be written: {error}; mend that, or choose another destination") from None


@contextmanager
def opened_tensors(path: Path) -> Iterator[Any]:
    """What ``save_tensors`` wrote, to be read by parts. Raises OutputError if it cannot be."""
    try:
        with safe_open(path, "pt") as stored:
            yield stored
    except UNREADABLE as error:
        raise OutputError(
            f"{path} cannot be read ({error}): run again with --resume; if that does not help, remove {path.parent} "
            "and start again without"
        ) from None


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All of it at once. Raises OutputError, too."""
    with opened_tensors(path) as stored:
        return {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 - not a dict
