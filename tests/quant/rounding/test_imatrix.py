"""An importance matrix from a file: what was saved, or one clear line."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant.errors import InputError
from quant.rounding.imatrix import VERSION, ChannelMoments, Imatrix, Weighted
from quant.rounding.rounding import Nearest
from quant.scheme import Scheme

A = ChannelMoments(torch.rand(64) + 0.1, torch.rand(3, 64).bfloat16().float())
SAVED = Imatrix({"layers.0.q_proj": A, "layers.0.k_proj": A}, "text", "model")


def test_what_was_saved_is_loaded_and_shared_moments_are_kept_once(tmp_path: Path) -> None:
    SAVED.save(tmp_path / "im.safetensors")
    found = Imatrix.load(tmp_path / "im.safetensors", "model")
    assert found.text == "text" and set(found.moments) == set(SAVED.moments)
    assert found.moments["layers.0.q_proj"] is found.moments["layers.0.k_proj"]
    assert torch.equal(found.moments["layers.0.q_proj"].square, A.square)
    assert len(load_file(tmp_path / "im.safetensors")) == 2


def _with(change: Callable[[dict[str, torch.Tensor], dict[str, str]], object]) -> Callable[[Path], None]:
    def spoil(file: Path) -> None:
        tensors = load_file(file)
        about = {"format": VERSION, "text": "text", "model": "model", "same": json.dumps({"a": "layers.0.q_proj"})}
        change(tensors, about)
        save_file(tensors, file, about)

    return spoil


def _pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


SQUARE, DIRECTIONS = "layers.0.q_proj.square", "layers.0.q_proj.directions"
SPOILED: dict[str, Callable[[Path], object]] = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-5]),
    "empty": lambda file: file.write_bytes(b""),
    "no header": lambda file: file.write_bytes(b"\xff" * 4096),
    "a header without end": lambda file: file.write_bytes((2**40).to_bytes(8, "little") + b"{}"),
    "gone": Path.unlink,
    "pipe": _pipe,
    "NaN": _with(lambda tensors, about: tensors[SQUARE].fill_(torch.nan)),
    "infinite": _with(lambda tensors, about: tensors[DIRECTIONS].fill_(torch.inf)),
    "negative": _with(lambda tensors, about: tensors[SQUARE].neg_()),
    "other dtype": _with(lambda tensors, about: tensors.update({SQUARE: tensors[SQUARE].half()})),
    "other shape": _with(lambda tensors, about: tensors.update({SQUARE: tensors[SQUARE][:8].clone()})),
    "scalar": _with(lambda tensors, about: tensors.update({SQUARE: torch.tensor(1.0)})),
    "no directions": _with(lambda tensors, about: tensors.pop(DIRECTIONS)),
    "more tensors": _with(lambda tensors, about: tensors.update({"x": torch.ones(2)})),
    "no text": _with(lambda tensors, about: about.pop("text")),
    "no list": _with(lambda tensors, about: about.pop("same")),
    "an empty list": _with(lambda tensors, about: about.update(same="{}")),
    "a list of numbers": _with(lambda tensors, about: about.update(same='{"a": 3}')),
    "a list that is none": _with(lambda tensors, about: about.update(same="[" * 100_000)),
    "a Linear that is not there": _with(lambda tensors, about: about.update(same='{"a": "b"}')),
    "another format": _with(lambda tensors, about: about.update(format="2")),
    "another model": _with(lambda tensors, about: about.update(model="2")),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_what_is_no_importance_matrix_is_one_line(spoil: Callable[[Path], object], tmp_path: Path) -> None:
    file = tmp_path / "im.safetensors"
    SAVED.save(file)
    spoil(file)
    with pytest.raises(InputError, match=r"im\.safetensors") as refusal:
        Imatrix.load(file, "model")
    assert "\n" not in str(refusal.value)


def test_whatever_byte_is_spoiled_it_is_a_matrix_or_one_line(tmp_path: Path) -> None:
    file, source = tmp_path / "im.safetensors", Random(0)
    SAVED.save(file)
    whole = file.read_bytes()
    for _ in range(400):
        data = bytearray(whole)
        data[source.randrange(len(data))] = source.randrange(256)
        file.write_bytes(data[: source.choice([len(data), source.randrange(len(data))])])
        with suppress(InputError):
            found = Imatrix.load(file, "model")
            assert all(moments.square.isfinite().all() for moments in found.moments.values())


def test_a_matrix_with_other_channels_than_the_weight_is_refused() -> None:
    with pytest.raises(InputError, match="64 channels for q_proj, which has 128"):
        Weighted(SAVED, Nearest()).encode(torch.ones(8, 128), Scheme("int4", 32), "q_proj", False, "layers.0.q_proj", 0)
