"""Which files are the model, by transformers' rule, and headers that are not what the format demands."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from quant.checkpoint.weight_files import INDEX, SINGLE, model_entries, read_header
from quant.errors import CheckpointError
from tests import hostile

Tiny = Callable[..., Path]
A = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}
B = {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]}


@pytest.mark.parametrize("beside", ["model_backup", "consolidated", "adapter_model", "imatrix", "pytorch_model"])
@pytest.mark.parametrize("shards", [1, 3])
def test_only_what_transformers_reads_is_the_model(tiny: Tiny, tmp_path: Path, beside: str, shards: int) -> None:
    shutil.copytree(tiny("olmoe", shards=shards), tmp_path / "model")
    expected = {key: entry.file.name for key, entry in model_entries(tmp_path / "model").items()}
    other = {"lm_head.weight": torch.zeros(4), "x": torch.zeros(1)}
    save_file(other, tmp_path / "model" / f"{beside}.safetensors")
    (tmp_path / "model" / "broken.safetensors").write_bytes(b"nothing")
    assert {key: entry.file.name for key, entry in model_entries(tmp_path / "model").items()} == expected


def test_one_file_wins_over_an_index(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny("olmoe", shards=3), tmp_path / "model")
    save_file({"x": torch.zeros(1)}, tmp_path / "model" / SINGLE)
    assert set(model_entries(tmp_path / "model")) == {"x"}


def test_a_directory_without_them_says_what_is_there(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    (tmp_path / "model.gguf").touch()
    with pytest.raises(CheckpointError, match=r"found consolidated.safetensors, model.gguf, which transformers would"):
        model_entries(tmp_path)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({}, "has no 'weight_map'"),
        ([], "is no JSON object: expected a safetensors index"),
        ({"weight_map": []}, "weight_map is []: expected"),
        ({"weight_map": {}}, "weight_map is {}: expected"),
        ({"weight_map": {"x": None}}, "weight_map.x is None: expected a valid string"),
        ({"weight_map": {"x": "../model.safetensors"}}, "weight_map.x is '../model.safetensors'"),
        ({"weight_map": {"x": "/etc/passwd"}}, "weight_map.x is '/etc/passwd'"),
        ({"weight_map": {"x": "a\x00.safetensors"}}, "weight_map.x is "),
        ({"weight_map": {"x": "a.safetensors"}}, "has no 'metadata'"),
        ({"weight_map": {"x": "a.safetensors"}, "metadata": True}, "metadata is True: expected"),
        ({"weight_map": {"x": "gone.safetensors"}, "metadata": {}}, "gone.safetensors is missing"),
        ({"weight_map": {"y": "a.safetensors"}, "metadata": {}}, "says that a.safetensors holds y, but it does not"),
        ({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}, "metadata": {}}, "both hold x"),
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, index: object, said: str) -> None:
    for name in "ab":
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert said in hostile.refusal(lambda: model_entries(tmp_path))


@pytest.mark.parametrize("place", ["config", SINGLE, INDEX])
def test_what_is_no_file_is_said_to_be_none(tmp_path: Path, place: str) -> None:
    os.mkfifo(tmp_path / place)
    assert f"{place} is a named pipe: expected a file" in hostile.refusal(
        lambda: read_header(tmp_path / place) if place == "config" else model_entries(tmp_path)
    )


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"a": A, "b": {**B, "data_offsets": [1, 3]}}, "tensor b overlaps a"),
        ({"a": A, "b": {**B, "data_offsets": [3, 5]}}, "tensor b does not follow a"),
        (
            {"a": {**A, "data_offsets": [1, 3]}, "b": {**B, "data_offsets": [3, 5]}},
            "tensor a does not follow the header",
        ),
        ({"a": A, "b": {**B, "shape": None}}, "b.shape is None"),
        ({"a": A, "b": {**B, "shape": 2}}, "b.shape is 2"),
        ({"a": A, "b": {**B, "shape": [-2]}}, "b.shape.0 is -2"),
        ({"a": A, "b": {**B, "shape": [2.0]}}, "b.shape.0 is 2.0"),
        ({"a": A, "b": {**B, "shape": [2**40, 2**40]}}, "expected 1,208,925,819,614,629,174,706,176"),
        ({"a": A, "b": {**B, "shape": [1] * 100}}, "b.shape is"),
        ({"a": A, "b": {**B, "data_offsets": [4, 2]}}, "spans -2 bytes"),
        ({"a": A, "b": {**B, "data_offsets": [2]}}, "b.data_offsets is [2]"),
        ({"a": A, "b": {**B, "data_offsets": {"0": 2}}}, "b.data_offsets is"),
        ({"a": A, "b": {**B, "dtype": None}}, "b.dtype is None"),
        ({"a": A, "b": {**B, "dtype": "U4"}}, "tensor b has dtype 'U4'"),
        ({"a": A, "b": [B]}, "b is ["),
        ({"a": A, "b": {**B, "more": 1}}, "unknown key b.more"),
        ({"a": A, "b": B, "__metadata__": {"x": 1}}, "its metadata: x is 1"),
        ({"a": A, "b": B, "__metadata__": []}, "its metadata: it is []"),
        ('{"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, Infinity]}}', "Infinity is no JSON"),
        (json.dumps({"a": A, "b": B})[:-1] + ', "a": {}}', "has 'a' twice"),
        ("[" * 5000, "expected a JSON object"),
        ('{"a": ' + "[" * 5000, "nested without end"),
    ],
)
def test_a_header_that_is_none_is_refused(tmp_path: Path, header: object, said: str) -> None:
    hostile.write_safetensors(tmp_path / "x.safetensors", header, bytes(4))
    refused = hostile.refusal(lambda: read_header(tmp_path / "x.safetensors"))
    assert said in refused and len(refused) < 400


@pytest.mark.parametrize("length", [0, 1, 8, 9, 2**31, 2**63, 2**64 - 1])
def test_a_header_of_any_length_is_refused(tmp_path: Path, length: int) -> None:
    (tmp_path / "x").write_bytes(length.to_bytes(8, "little") + b"{}")
    assert hostile.refusal(lambda: read_header(tmp_path / "x"))


@settings(deadline=None)
@given(data=st.data())
def test_what_we_take_safetensors_takes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Not the other way round: safetensors knows dtypes that no model of ours has."""
    file = tmp_path_factory.mktemp("x") / "x.safetensors"
    header = data.draw(hostile.mutations({"a": A, "b": B, "__metadata__": {"format": "pt"}}))
    hostile.write_safetensors(file, header, bytes(4), padding=data.draw(st.integers(0, 9)))
    if hostile.refusal(lambda: read_header(file)):
        return
    try:
        with safe_open(file, "pt") as opened:
            theirs = {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise AssertionError(header) from error
    assert theirs == {key: list(entry.shape) for key, entry in read_header(file)[0].items()}
