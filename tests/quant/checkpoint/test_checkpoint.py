"""A checkpoint is opened by its headers, checked, and read one expert at a time."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quant.checkpoint.checkpoint import Checkpoint, read_into
from quant.checkpoint.file_states import FileStates
from quant.checkpoint.weight_files import read_header
from quant.convert.convert import convert
from quant.errors import CheckpointError
from quant.model.config import read_config
from quant.model.families import PROJECTIONS
from quant.scheme import Scheme
from tests import hostile
from tests.checkpoints import FAMILIES

Tiny = Callable[..., Path]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_reads_as_safetensors_reads_it(tiny: Tiny, family: str, shards: int) -> None:
    folder = tiny(family, shards=shards)
    checkpoint = Checkpoint.open(folder)
    seen: set[str] = set()
    for file in folder.glob("*.safetensors"):
        for key, expected in load_file(file).items():
            assert torch.equal(checkpoint.read(key), expected)
            seen.add(key)
    assert seen == set(checkpoint.entries)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_an_expert_is_the_same_fused_or_not(tiny: Tiny, family: str) -> None:
    one, fused = Checkpoint.open(tiny(family)), Checkpoint.open(tiny(f"{family}_fused"))
    layer = one.shape.moe_layers[-1]
    held = fused.fused_experts(layer)
    assert one.fused_experts(layer) is None and held is not None
    assert held.entries["down_proj"].key == f"model.layers.{layer}.mlp.experts.down_proj"
    for expert in (0, 7):
        a, b = one.expert(layer, expert), fused.expert(layer, expert)
        assert all(torch.equal(a[name].dense(), b[name].dense()) for name in PROJECTIONS)


@pytest.mark.parametrize("family", ["llama4", "llama4_text", "llama4_maverick"])
def test_a_llama4_expert_is_transposed_and_gate_comes_before_up(tiny: Tiny, family: str) -> None:
    checkpoint = Checkpoint.open(tiny(family))
    layer = checkpoint.shape.moe_layers[0]
    base = f"{checkpoint.shape.layer_prefix(layer)}feed_forward.experts."
    gate_up, down = checkpoint.read(f"{base}gate_up_proj"), checkpoint.read(f"{base}down_proj")
    views = checkpoint.expert(layer, 3)
    assert all(view.transposed for view in views.values())
    assert torch.equal(views["gate_proj"].dense(), gate_up[3, :, :128].t())
    assert torch.equal(views["up_proj"].dense(), gate_up[3, :, 128:].t())
    assert torch.equal(views["down_proj"].dense(), down[3].t())


def test_a_block_of_rows_reads_alone(tiny: Tiny) -> None:
    checkpoint = Checkpoint.open(tiny("olmoe"))
    whole = checkpoint.read("lm_head.weight")
    assert torch.equal(checkpoint.read("lm_head.weight", 10 * 128 * 2, (5, 128)), whole[10:15])


def test_keys_are_found_under_either_name_of_the_moe_block(tiny: Tiny) -> None:
    fused = Checkpoint.open(tiny("mixtral_fused"))
    entry = fused.find("model.layers.0.block_sparse_moe.gate.weight")
    assert entry.key == "model.layers.0.mlp.gate.weight"
    assert fused.canonical(entry.key) == "model.layers.0.block_sparse_moe.gate.weight"
    with pytest.raises(CheckpointError, match=r"has no tensor model.layers.9.block_sparse_moe.gate.weight"):
        fused.find("model.layers.9.block_sparse_moe.gate.weight")


def test_identity_tells_models_apart_and_survives_a_copy(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny("olmoe"), tmp_path / "copy")
    one, copy = Checkpoint.open(tiny("olmoe")), Checkpoint.open(tmp_path / "copy")
    assert one.identity == copy.identity != Checkpoint.open(tiny("mixtral")).identity
    assert len(one.identity) == 16


def test_a_directory_that_is_no_model_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no config.json in it"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"')
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="no JSON object"):
        read_config(tmp_path)


def test_a_config_without_weights_says_so(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copyfile(tiny("olmoe") / "config.json", tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"has no \*.safetensors file"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ('{"a": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 6]}}', "spans 6 bytes, expected 8"),
        ('{"a": {"dtype": "Q4", "shape": [4], "data_offsets": [0, 8]}}', "has dtype 'Q4'"),
        ('{"a": {"shape": [4]}}', "header does not parse"),
        ('{"a": 3}', "header does not parse"),
        ('{"a": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}} x', "header does not parse"),
    ],
)
def test_a_bad_header_is_refused(tmp_path: Path, header: str, match: str) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(8))
    with pytest.raises(CheckpointError, match=match):
        read_header(file)


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_a_file_cut_anywhere_is_refused(tiny: Tiny, tmp_path: Path, cut: int) -> None:
    data = (tiny("olmoe") / "model.safetensors").read_bytes()
    file = tmp_path / "x.safetensors"
    file.write_bytes(data[:cut])
    with pytest.raises(CheckpointError, match="truncated"):
        read_header(file)


def test_a_file_that_grew_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes((tiny("olmoe") / "model.safetensors").read_bytes() + b"more")
    with pytest.raises(CheckpointError, match="longer than its header says"):
        read_header(file)


def test_a_shard_that_shrinks_after_opening_is_refused_when_read(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny("olmoe"), tmp_path / "model")
    checkpoint = Checkpoint.open(tmp_path / "model")
    last = max(checkpoint.entries.values(), key=lambda entry: entry.offset)
    os.truncate(last.file, last.offset + 4)
    with pytest.raises(CheckpointError, match="was cut short while it was read"):
        checkpoint.read(last.key)


def test_a_file_that_vanishes_is_refused_when_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="gone is missing"):
        read_into(tmp_path / "gone", 0, memoryview(bytearray(8)), FileStates({}))


def test_a_quantized_checkpoint_knows_that_it_is(tiny: Tiny, tmp_path: Path) -> None:
    convert(tiny("llama4"), tmp_path / "packed", {"experts": Scheme("int4")})
    assert Checkpoint.open(tmp_path / "packed").is_quantized
    assert not Checkpoint.open(tiny("llama4")).is_quantized
    shutil.copytree(tiny("llama4"), tmp_path / "model")
    hostile.edit_json(tmp_path / "model" / "config.json", lambda config: config.update(quantization_config=None))
    assert not Checkpoint.open(tmp_path / "model").is_quantized
    foreign = {"quant_method": "fp8"}
    hostile.edit_json(
        tmp_path / "model" / "config.json", lambda config: config["text_config"].update(quantization_config=foreign)
    )
    with pytest.raises(CheckpointError, match="is quantized by 'fp8'"):
        Checkpoint.open(tmp_path / "model")
