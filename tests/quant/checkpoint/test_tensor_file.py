"""Tensors in a file: the same ones give the same bytes, which safetensors reads."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from quant.checkpoint.tensor_file import save_tensors
from quant.errors import OutputError

TENSORS = {
    "z": torch.arange(6, dtype=torch.float32).reshape(2, 3).t(),
    "flags": torch.tensor([True, False, True]),
    "half": torch.tensor([1.5, -2.0, 0.1], dtype=torch.bfloat16),
    "words": torch.tensor([[2**31 - 1, -1]], dtype=torch.int32),
    "one": torch.tensor(3.25),
    "none": torch.zeros(0, 4),
}


def test_what_is_written_is_what_safetensors_reads(tmp_path: Path) -> None:
    about = {"what": "a \u00fc test", "more": "{}"}
    save_tensors(tmp_path / "file", TENSORS, about)
    found = load_file(tmp_path / "file")
    assert found.keys() == TENSORS.keys()
    for key, tensor in TENSORS.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key
    with safe_open(tmp_path / "file", "pt") as opened:
        assert opened.metadata() == about


def test_the_same_tensors_in_another_order_give_the_same_bytes_for_all_to_read(tmp_path: Path) -> None:
    about = {f"key {number}": "value" for number in range(12)}
    save_tensors(tmp_path / "a", TENSORS, about)
    save_tensors(tmp_path / "b", dict(reversed(TENSORS.items())), about)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    (tmp_path / "plain").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        save_tensors(tmp_path / "no" / "file", TENSORS)
