"""States of files where the folder itself cannot be read."""

from pathlib import Path

import pytest

from quant.checkpoint.file_states import FileStates
from quant.errors import CheckpointError


def test_a_folder_that_cannot_be_listed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x")
    assert FileStates.of_folder(tmp_path).listed([file])[0][:2] == ["model.safetensors", 1]

    def fails(_: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "iterdir", fails)
    with pytest.raises(CheckpointError, match=r"could not be listed when model\.safetensors was opened"):
        FileStates.of_folder(tmp_path).listed([file])
