"""Data begins on a page, experts lie one after another, and safetensors itself agrees."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from quant.checkpoint.layout import PAGE, StoredTensor, lay_out, lay_out_checkpoint, stored_linear
from quant.checkpoint.weight_files import read_header
from quant.convert.convert import convert
from quant.model.families import PROJECTIONS, Role
from quant.model.known_shapes import load_shape
from quant.model.shape import ModelShape
from quant.model.tensors import LinearSpec
from quant.scheme import Scheme
from quant.synth.config import untrained_config

Tiny = Callable[..., Path]
INT4: dict[Role, Scheme] = {"experts": Scheme("int4")}


@pytest.mark.parametrize("kind", ["int2", "int3", "int4", "int8", "nf4"])
@pytest.mark.parametrize("family", ["llama4", "llama4_maverick", "mixtral"])
def test_every_file_begins_its_data_on_a_page(tiny: Tiny, tmp_path: Path, family: str, kind: str) -> None:
    convert(tiny(family), tmp_path / "out", {"experts": Scheme.parse(kind)})
    for file in (tmp_path / "out").glob("*.safetensors"):
        entries, metadata = read_header(file)
        assert min(entry.offset for entry in entries.values()) % PAGE == 0
        assert metadata == {"format": "pt"}
        with safe_open(file, "pt") as theirs:  # safetensors refuses holes and overlaps
            assert set(theirs.keys()) == set(entries)


@pytest.mark.parametrize("family", ["llama4_text", "llama4_maverick", "qwen3_moe", "mixtral_fused"])
def test_the_tensors_of_one_expert_lie_side_by_side_in_order(tiny: Tiny, tmp_path: Path, family: str) -> None:
    convert(tiny(family), tmp_path / "out", INT4)
    shape = ModelShape.from_config(json.loads((tmp_path / "out" / "config.json").read_text()))
    size = shape.expert_nbytes(Scheme("int4"))
    weight_map = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    for number, layer in enumerate(shape.moe_layers, start=2):
        name = f"model-{number:05d}-of-{len(shape.moe_layers) + 1:05d}.safetensors"
        entries, _ = read_header(tmp_path / "out" / name)
        start = min(entry.offset for entry in entries.values())
        for expert in range(shape.num_experts):
            position = start + expert * size
            for projection in PROJECTIONS:
                for suffix in ("weight_packed", "weight_scale"):
                    key = f"{shape.expert_module(layer, expert, projection)}.{suffix}"
                    assert weight_map[key] == name and entries[key].offset == position
                    position += entries[key].nbytes
        tail = [entry for key, entry in entries.items() if key.endswith("weight_shape")]
        assert len(tail) == 3 * shape.num_experts
        assert min(entry.offset for entry in tail) == start + shape.num_experts * size


def test_scouts_experts_begin_on_pages() -> None:
    shape = ModelShape.from_config(untrained_config(load_shape("scout")))
    assert shape.expert_nbytes(Scheme("int4")) % PAGE == 0
    layout = lay_out_checkpoint(shape, INT4, [StoredTensor(s.key, "BF16", s.shape) for s in shape.plain_tensors()])
    assert len(layout.files) == 49
    for expert in (0, 1, 15):
        _, offset = layout.place(f"{shape.expert_module(47, expert, 'gate_proj')}.weight_packed")
        assert offset == layout.files[-1].data_start + expert * shape.expert_nbytes(Scheme("int4"))
        assert offset % PAGE == 0
    big = [key for key in layout.files[0].offsets if "proj" in key or "lm_head" in key]
    assert big and all(layout.place(key)[1] % PAGE == 0 for key in big)


def test_odd_sizes_shift_nothing_that_follows() -> None:
    odd, even = StoredTensor("a", "U8", (3,)), StoredTensor("b", "BF16", (8,))
    shape = StoredTensor("c", "I64", (2,))
    file = lay_out("f", [even], [odd, shape])
    assert list(file.offsets) == ["b", "c", "a"]
    assert all(file.offsets[t.key] % 8 == 0 for t in (even, shape))
    assert file.nbytes == file.data_start + 16 + 16 + 3


def test_the_header_is_padded_with_spaces_to_its_page() -> None:
    file = lay_out("f", [StoredTensor(f"tensor.{i}", "F32", (2,)) for i in range(100)], [])
    assert len(file.header) % PAGE == 0 and int.from_bytes(file.header[:8], "little") == len(file.header) - 8
    assert file.header.rstrip(b" ").endswith(b"}") and json.loads(file.header[8:])["tensor.99"]["dtype"] == "F32"


@pytest.mark.parametrize("kind", ["int2", "int3", "int4", "int8", "nf4", "bf16"])
def test_body_bytes_are_what_the_scheme_counts(kind: str) -> None:
    scheme = Scheme.parse(kind)
    stored = stored_linear(LinearSpec("m", "experts", 256, 384), scheme)
    assert sum(tensor.nbytes for tensor in stored.body) == scheme.nbytes(256, 384)
    assert all(len(stored.constants[tensor.key]) == tensor.nbytes for tensor in stored.tail)
