"""A stored scale that is no number is refused by its tensor's name, wherever it is read from."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from offload.experts.storage.finite import is_finite
from offload.records import RunOptions, Sampling
from offload.run.session import Session
from quant.convert.convert import convert
from quant.errors import CheckpointError, NonFiniteError
from quant.scheme import Scheme
from tests import hostile, sessions
from tests.family_checkpoints import make_family

SPLITS: dict[str, dict[str, Any]] = {
    "all, mapped at first": {"ram_slots": 64},
    "few": {"ram_slots": 3, "fills": False},
    "device": {"ram_slots": 3, "vram_slots": 9},
}


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [("BF16", torch.bfloat16), ("F16", torch.float16), ("F32", torch.float32), ("F64", torch.float64)],
)
@given(data=st.data())
def test_it_is_told_as_torch_tells_it(dtype: str, kind: torch.dtype, data: st.DataObject) -> None:
    size = kind.itemsize * data.draw(st.integers(1, 9))
    bits = data.draw(st.binary(min_size=size, max_size=size))
    values = torch.from_numpy(np.frombuffer(bits, np.uint8).copy()).view(kind)
    assert is_finite(memoryview(bits), dtype) == bool(values.isfinite().all())


def test_the_last_of_many_is_looked_at() -> None:
    values = torch.ones(200_001)
    values[-1] = float("inf")
    assert not is_finite(memoryview(values.numpy().tobytes()), "F32")


@pytest.fixture(scope="module")
def packed(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    destination = tmp_path_factory.mktemp("packed") / "model"
    convert(tiny("olmoe"), destination, {"experts": Scheme("int4"), "attention": Scheme("int8")})
    return destination


def spoiled(source: Path, folder: Path, key: str, value: float) -> Path:
    """A copy of ``source`` with one value of tensor ``key`` replaced."""
    shutil.copytree(source, folder)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if key in tensors:
            tensors[key].view(-1)[-1] = value
            save_file(tensors, file, {"format": "pt"})
    return folder


def run(model: Path, **placed: Any) -> list[int]:
    with sessions.session(model, RunOptions(context=200, exact=True), **placed) as session:
        session.finish_filling() if placed.get("fills", True) else None
        return [record.token_id for record in session.generate(list(range(5, 120)), Sampling(max_tokens=4))]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("split", SPLITS)
def test_a_scale_of_an_expert_is_named(packed: Path, tmp_path: Path, split: str, value: float) -> None:
    key = "model.layers.2.mlp.experts.5.up_proj.weight_scale"
    model = spoiled(packed, tmp_path / "model", key, value)
    with pytest.raises(NonFiniteError, match=rf"tensor {key} holds NaN or infinite scales"):
        run(model, **SPLITS[split])


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.1.self_attn.q_proj.weight_scale",
        "model.layers.1.self_attn.q_norm.weight",
        "model.layers.3.mlp.gate.weight",
        "model.norm.weight",
    ],
)
def test_a_small_tensor_is_named_as_it_is_loaded(packed: Path, tmp_path: Path, key: str) -> None:
    with pytest.raises(NonFiniteError, match=rf"tensor {key} has 1 NaN"):
        run(spoiled(packed, tmp_path / "model", key, float("nan")), ram_slots=64)


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
@pytest.mark.parametrize("part", ["q_proj", "k_proj", "bias", "sinks"])
def test_what_attention_of_torch_would_pass_over_is_named(tmp_path: Path, family: str, part: str) -> None:
    source = make_family(family, tmp_path / "source")
    keys = [key for file in source.glob("model*.safetensors") for key in load_file(file) if part in key]
    if not keys:
        pytest.skip(f"{family} has no {part}")
    model = spoiled(source, tmp_path / "model", keys[0], float("nan"))
    with pytest.raises(NonFiniteError, match=rf"tensor {keys[0]} h"):
        run(model, ram_slots=64)


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 10**400])
def test_a_config_of_no_numbers_is_refused(packed: Path, tmp_path: Path, key: str, value: float) -> None:
    shutil.copytree(packed, tmp_path / "model")
    hostile.edit_json(
        tmp_path / "model" / "config.json",
        lambda config: config.update({key: value, "rope_parameters": {"rope_theta": value if "rope" in key else 1e4}}),
    )
    with pytest.raises(CheckpointError, match=r"config\.json"):
        run(tmp_path / "model", ram_slots=64)


@pytest.mark.parametrize("padding", [1, 2, 4, 7])
@pytest.mark.parametrize("family", ["mixtral", "llama4_text"])
def test_data_may_begin_anywhere(tiny: Callable[..., Path], tmp_path: Path, family: str, padding: int) -> None:
    """The format pads a header as its writer likes: nothing promises that a tensor begins at a multiple of its
    values' size."""
    convert(tiny(family), tmp_path / "model", {"experts": Scheme("int4"), "attention": Scheme("int8")})
    expected = run(tmp_path / "model", ram_slots=64)
    for file in (tmp_path / "model").glob("*.safetensors"):
        header, body = hostile.read_safetensors(file)
        hostile.write_safetensors(file, header, body, padding=padding)
    for split in SPLITS.values():
        assert run(tmp_path / "model", **split) == expected


@pytest.mark.parametrize(("beyond", "told"), [(0, 0), (4, 0), (1, 1), (2, 1)])
def test_what_direct_io_cannot_read_is_said_once_with_its_price(
    tiny: Callable[..., Path], tmp_path: Path, beyond: int, told: int
) -> None:
    """``beyond`` is where in a page the data begins; packed values are words of four bytes."""
    convert(tiny("olmoe"), tmp_path / "model", {"experts": Scheme("int4")})
    for file in (tmp_path / "model").glob("*.safetensors"):
        header, body = hostile.read_safetensors(file)
        hostile.write_safetensors(file, header, body)
        start = file.stat().st_size - len(body)
        hostile.write_safetensors(file, header, body, padding=(beyond - start) % 4096)
    with Session.open(tmp_path / "model", device="cpu") as session:
        notes = [note for note in session.notes if "direct I/O cannot read" in note]
    assert len(notes) == told
    assert all("KiB of experts" in note and "memory beyond --ram" in note for note in notes)


def test_a_dense_checkpoint_may_begin_anywhere(tiny: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(tiny("mixtral_fused"), tmp_path / "model")
    expected = run(tmp_path / "model", ram_slots=64)
    header, body = hostile.read_safetensors(tmp_path / "model" / "model.safetensors")
    hostile.write_safetensors(tmp_path / "model" / "model.safetensors", header, body, padding=3)
    assert run(tmp_path / "model", ram_slots=3, fills=False) == expected
    convert(tmp_path / "model", tmp_path / "odd", {"experts": Scheme("int4")})
    convert(tiny("mixtral_fused"), tmp_path / "even", {"experts": Scheme("int4")})
    for file in (tmp_path / "even").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "odd" / file.name).read_bytes()


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ('{"quant_type": "fp4", "blocksize": 64, "dtype": "bfloat16", "shape": [128, 128]}', "quant_type is 'fp4'"),
        ('{"quant_type": "nf4", "blocksize": 32, "dtype": "bfloat16", "shape": [128, 128]}', "says blocks of 32"),
        ('{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 256]}', r"shape \[64, 256\]"),
        ('{"quant_type": "nf4", "blocksize": 64, "dtype": "int9", "shape": [128, 128]}', "dtype is 'int9'"),
        ('{"quant_type": "nf4"', "cannot be read as JSON"),
        ("[]", "expected an object"),
    ],
)
def test_what_an_nf4_weight_says_of_itself_is_checked(
    tiny: Callable[..., Path], tmp_path: Path, state: str, said: str
) -> None:
    convert(tiny("olmoe"), tmp_path / "model", {"experts": Scheme("nf4")})
    key = "model.layers.0.mlp.experts.1.gate_proj.weight.quant_state.bitsandbytes__nf4"
    for file in (tmp_path / "model").glob("*.safetensors"):
        tensors = load_file(file)
        if key in tensors:
            tensors[key] = torch.tensor(list(state.encode()), dtype=torch.uint8)
            save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"tensor {key}.*{said}"):
        run(tmp_path / "model", ram_slots=64)
