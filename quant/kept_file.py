"""JSON that a run keeps for a later one: written whole or not at all, with a checksum, so that what was spoiled
since is noticed."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quant.errors import OutputError
from quant.input_file import opened, read_object
from quant.output_file import replace_file

_SUM = "sha256"


def keep(path: Path, data: Mapping[str, Any]) -> None:
    """Make ``data``, finite plain values, the contents of ``path``. Raises OutputError."""
    plain = json.loads(json.dumps(data, allow_nan=False))  # keys are text, tuples lists
    replace_file(path, json.dumps({**plain, _SUM: _sum_of(plain)}).encode())


def kept(path: Path) -> dict[str, Any]:
    """What ``keep`` wrote. Raises OutputError if it is not there or not as it was written."""
    data = read_object(path, "what an earlier run kept", OutputError)
    if data.pop(_SUM, None) != _sum_of(data):
        raise OutputError(f"{path} is not as it was written: its checksum is another")
    return data


def file_sum(path: Path) -> str:
    """The SHA-256 of what ``path`` holds. Raises OutputError if it cannot be read."""
    digest = hashlib.sha256()
    with opened(path, OutputError) as descriptor, open(descriptor, "rb", buffering=0, closefd=False) as stream:
        while block := stream.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _sum_of(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, allow_nan=False).encode()).hexdigest()
