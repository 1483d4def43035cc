"""Files of tensors that a run keeps for itself or another run: written whole or not at all, each failure one line."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant.errors import OutputError
from quant.output_file import replacing


def save_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with ``about`` in its header, and wait until it is on disk. Raises OutputError."""
    with replacing(path) as draft:
        try:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, draft, dict(about or {}) or None)
        except SafetensorError as error:
            raise OutputError(f"{path} cannot be written: {error}; mend that, or choose another destination") from None


def load_tensors(path: Path) -> dict[str, Tensor]:
    """What ``save_tensors`` wrote. Raises OutputError if it cannot be read: a run cannot go on from it."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"{path} cannot be read ({error}): remove {path.parent} and start again without --resume"
        ) from None
