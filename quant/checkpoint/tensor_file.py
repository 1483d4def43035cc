"""Files of tensors that a run keeps for itself or another run: written whole or not at all, each failure one line.

Written here and not by safetensors' own writer, which orders the header's metadata at random, gives the file to its
owner alone, and leaves a temporary file of its own where a run is killed: the same tensors give the same bytes.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, uint8

from quant.checkpoint.checkpoint import DTYPES
from quant.errors import OutputError
from quant.output_file import replacing

_ALIGNMENT = 8
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
UNREADABLE = (OSError, SafetensorError, RuntimeError)  # the last where torch maps the file


def save_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with ``about`` in its header, and wait until it is on disk. Raises OutputError."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # so that each is aligned
    header: dict[str, Any] = {"__metadata__": dict(about)} if about else {}
    at = 0
    for key, tensor in ordered:
        end = at + tensor.nbytes
        header[key] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with replacing(path) as draft, draft.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            stream.write(tensor.contiguous().reshape(-1).view(uint8).numpy().data)


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
