"""A GGUF file is what the gguf package says of it: every type, every architecture's names, whole and split; and
whatever its bytes are, opening it is right or one line."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from transformers import AutoTokenizer

from quant.convert.convert import convert
from quant.convert.quantize import quantize
from quant.errors import CheckpointError, ColdstreamError, UsageError
from quant.scheme import Scheme
from quant.sources.gguf import PLAIN, QUANTIZED
from quant.sources.gguf_file import read_gguf
from quant.sources.open import open_source
from tests.quant.sources.foreign import tensors_of
from tests.quant.sources.gguf_files import write_gguf

Tiny = Callable[..., Path]
Kind = GGMLQuantizationType
SMALL: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"mlp_only_layers": []},
    "olmoe": {},
    "llama4_text": {},
    "llama4_maverick": {},
}


def tiny_of(tiny: Tiny, family: str, **more: Any) -> Path:
    return tiny(family, num_hidden_layers=2, **SMALL[family], **more)


@pytest.mark.parametrize("family", SMALL)
def test_every_architecture_has_its_names(tiny: Tiny, tmp_path: Path, family: str) -> None:
    source, path = tiny_of(tiny, family), tmp_path / "model.gguf"
    meant = write_gguf(source, path, family, Kind.Q8_0)
    found = open_source(path, source if family.startswith("llama4") else None)
    for key, expected in meant.items():
        assert torch.equal(found.read(found.alias(key)), expected), key
    assert len(found.entries) == len(meant)


@pytest.mark.parametrize("kind", [*PLAIN, *QUANTIZED], ids=lambda kind: kind.name)
def test_every_type_is_what_the_package_makes_of_it(tiny: Tiny, tmp_path: Path, kind: Kind) -> None:
    source, path = (
        tiny_of(tiny, "mixtral", hidden_size=256, intermediate_size=256, head_dim=64),
        tmp_path / "model.gguf",
    )
    meant = write_gguf(source, path, "mixtral", kind)
    found = open_source(path)
    for key, expected in meant.items():
        rows = found.read(key)
        assert torch.equal(rows, expected), key
        if len(expected) > 10 and expected.dim() == 2:
            columns = expected.shape[1]
            assert torch.equal(found.read(key, 3 * columns * 4, (7, columns)), expected[3:10]), key
    assert f"weights in GGUF {kind.name}" in found.forms  # type: ignore[attr-defined]


def test_a_model_may_be_split_over_files(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny_of(tiny, "olmoe")
    meant = write_gguf(source, tmp_path / "model.gguf", "olmoe", Kind.Q4_0, split=10)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) > 2 and parts[0].name == f"model-00001-of-{len(parts):05d}.gguf"
    found = open_source(parts[0])
    assert all(torch.equal(found.read(key), expected) for key, expected in meant.items())
    assert found.files == parts
    with pytest.raises(CheckpointError, match="expected the first of them"):
        read_gguf(parts[1])
    parts[2].rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=f"{parts[2].name} is missing"):
        open_source(parts[0])


@pytest.mark.parametrize("family", ["mixtral", "llama4_text"])
def test_a_conversion_of_bf16_is_that_of_the_original(tiny: Tiny, tmp_path: Path, family: str) -> None:
    source, path = tiny_of(tiny, family), tmp_path / "gguf" / "model.gguf"
    path.parent.mkdir()
    write_gguf(source, path, family)
    schemes: Any = {"experts": Scheme("int4"), "attention": Scheme("int8")}
    directory = source if family == "llama4_text" else None
    report = convert(open_source(path, directory), tmp_path / "out", schemes, rounding="rtn")
    convert(source, tmp_path / "expected", schemes, rounding="rtn")
    found, expected = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "expected")
    assert found.keys() == expected.keys()
    for key in expected:
        assert torch.equal(found[key].to(expected[key].dtype), expected[key]), key
    assert any("weights in GGUF BF16" in note for note in report.notes)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("he").input_ids == ([255] if directory is None else [71, 68])


def test_a_directory_has_a_tokenizer_of_its_own(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(tiny_of(tiny, "qwen3_moe"), path, "qwen3_moe", Kind.Q8_0)
    quantize(path, tmp_path / "out", experts="int8", rounding="rtn")
    with pytest.raises(UsageError, match="--tokenizer is for a GGUF file"):
        open_source(tmp_path / "out", tmp_path)


REFUSED: dict[str, tuple[str, Callable[[GGUFWriter], object], str]] = {
    "a scaled rotary embedding": (
        "olmoe",
        lambda w: w.add_string("olmoe.rope.scaling.type", "yarn"),
        "has a scaled rotary embedding.*--tokenizer DIR",
    ),
    "factors of a rotary embedding": (
        "mixtral",
        lambda w: w.add_tensor("rope_freqs.weight", np.ones(16, np.float32)),
        "has a scaled rotary embedding.*--tokenizer DIR",
    ),
    "Llama 4 without its config": ("llama4_text", id, "architecture 'llama4'.*--tokenizer DIR"),
    "another tensor": (
        "olmoe",
        lambda w: w.add_tensor("blk.0.ssm_a", np.ones((4, 32), np.float32)),
        "tensor blk.0.ssm_a is not part of a olmoe model",
    ),
    "a layer too many": (
        "olmoe",
        lambda w: w.add_tensor("blk.9.attn_norm.weight", np.ones(128, np.float32)),
        "model.layers.9.input_layernorm.weight has no place",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_file_does_not_say_or_nobody_asked_for_is_refused(tiny: Tiny, tmp_path: Path, case: str) -> None:
    family, edit, said = REFUSED[case]
    write_gguf(tiny_of(tiny, family), tmp_path / "model.gguf", family, edit=edit)
    with pytest.raises(CheckpointError, match=said):
        open_source(tmp_path / "model.gguf")


def test_bytes_that_were_cut_or_changed_are_right_or_one_error(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(tiny_of(tiny, "olmoe"), path, "olmoe", Kind.Q4_0)
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    start = min(tensor.offset for tensor in read_gguf(path).tensors.values())
    for trial in range(150):
        made = bytearray(whole)
        if trial % 3 == 0:
            del made[int(random.integers(len(made))) :]
        else:
            for place in random.integers(start, size=1 + trial % 3):
                made[place] = random.choice([0, 1, 0x7F, 0xFF, int(random.integers(256))])
        path.write_bytes(made)
        with suppress(ColdstreamError):
            open_source(path)
