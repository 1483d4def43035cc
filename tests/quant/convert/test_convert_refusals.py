"""What cannot be converted is refused in one clear line, and nothing half-written is left behind."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant.convert.convert import convert
from quant.errors import CheckpointError, ColdstreamError, OutputError, RecipeError, SchemeError, UnknownFamilyError
from quant.model.families import Role
from quant.scheme import Scheme
from tests.checkpoints import make

Tiny = Callable[..., Path]
INT4: dict[Role, Scheme] = {"experts": Scheme("int4")}


@pytest.fixture
def source(tiny: Tiny, tmp_path: Path) -> Path:
    """A sharded checkpoint of its own for each test, to be broken."""
    shutil.copytree(tiny("llama4_text", shards=3), tmp_path / "source")
    return tmp_path / "source"


def refused(source: Path, error: type[ColdstreamError], match: str, schemes: object = None) -> str:
    """Converting ``source`` raises ``error`` with a message of one line, and leaves no trace."""
    destination = source.parent / "out"
    with pytest.raises(error, match=match) as caught:
        convert(source, destination, schemes or INT4)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    assert not destination.exists() and not destination.with_name("out.partial").exists()
    return message


def change(source: Path, key: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Rewrite one tensor of ``source``."""
    for file in source.glob("*.safetensors"):
        tensors = load_file(file)
        if key in tensors:
            tensors[key] = edit(tensors[key]).contiguous()
            save_file(tensors, file, {"format": "pt"})


def spoil(position: tuple[int, ...], value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def edit(tensor: torch.Tensor) -> torch.Tensor:
        tensor[position] = value
        return tensor

    return edit


def test_a_missing_shard(source: Path) -> None:
    (source / "model-00002-of-00003.safetensors").unlink()
    refused(source, CheckpointError, r"model-00002-of-00003.safetensors is missing")


def test_a_truncated_shard(source: Path) -> None:
    file = source / "model-00002-of-00003.safetensors"
    os.truncate(file, file.stat().st_size - 1000)
    refused(source, CheckpointError, r"model-00002.* is truncated: found [\d,]+ bytes, expected [\d,]+; download")


def test_a_corrupt_header(source: Path) -> None:
    file = source / "model-00003-of-00003.safetensors"
    data = bytearray(file.read_bytes())
    data[8:40] = b"\xff" * 32
    file.write_bytes(data)
    refused(source, CheckpointError, r"model-00003.* is corrupt")


def test_an_empty_shard(source: Path) -> None:
    (source / "model-00001-of-00003.safetensors").write_bytes(b"")
    refused(source, CheckpointError, r"model-00001.* is truncated or no safetensors file")


def test_an_index_that_names_an_absent_tensor(source: Path) -> None:
    file = source / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.layers.9.extra.weight"] = "model-00001-of-00003.safetensors"
    file.write_text(json.dumps(index))
    refused(source, CheckpointError, r"says that model-00001.* holds model.layers.9.extra.weight, but it does not")


def test_a_tensor_that_the_config_needs_is_absent(source: Path) -> None:
    file, key = source / "model.safetensors.index.json", "model.layers.1.self_attn.q_proj.weight"
    index = json.loads(file.read_text())
    shard = source / index["weight_map"].pop(key)
    file.write_text(json.dumps(index))
    save_file({name: tensor for name, tensor in load_file(shard).items() if name != key}, shard, {"format": "pt"})
    refused(source, CheckpointError, r"has no tensor model.layers.1.self_attn.q_proj.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_in_a_fused_expert_name_the_tensor_and_the_expert(source: Path, value: float) -> None:
    change(source, "model.layers.2.feed_forward.experts.gate_up_proj", spoil((5, 17, 200), value))
    refused(source, CheckpointError, r"tensor model.layers.2.feed_forward.experts.gate_up_proj, expert 5 has")


def test_nan_in_a_single_expert(tiny: Tiny, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny("mixtral"), source)
    change(source, "model.layers.1.block_sparse_moe.experts.3.w2.weight", spoil((1, 2), float("nan")))
    refused(source, CheckpointError, r"tensor model.layers.1.block_sparse_moe.experts.3.w2.weight, expert 3 has 1 NaN")


@pytest.mark.parametrize("key", ["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"])
def test_nan_in_a_tensor_that_is_carried_through(source: Path, key: str) -> None:
    change(source, key, lambda tensor: tensor.masked_fill(torch.arange(tensor.shape[-1]) == 3, float("nan")))
    refused(source, CheckpointError, rf"tensor {key} has [\d,]+ NaN and 0 infinite values")


def test_nan_under_nf4(source: Path) -> None:
    change(source, "model.layers.0.feed_forward.experts.down_proj", spoil((0, 0, 0), float("nan")))
    refused(source, CheckpointError, "expert 0 has 1 NaN", {"experts": Scheme("nf4")})


def test_large_finite_weights_are_not_taken_for_infinite(source: Path) -> None:
    change(source, "model.embed_tokens.weight", lambda tensor: torch.full_like(tensor, 3e38))
    convert(source, source.parent / "out", INT4)


def test_an_architecture_that_nobody_knows_or_another_one_is_named(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "nobodys"}))
    refused(source, UnknownFamilyError, "'nobodys'")
    (source / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    refused(source, CheckpointError, "no tensor transformer.wte.weight: expected it for this architecture")


def test_a_group_size_that_does_not_divide_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    source = make("llama4_text", tmp_path / "source", intermediate_size=192)
    message = refused(source, SchemeError, "groups of 128 do not divide: use --group-size 32 or 64")
    assert "model.layers.0.feed_forward.experts.0.down_proj has 192 input features" in message


def test_nothing_fits_a_dimension_of_no_group_size(tmp_path: Path) -> None:
    source = make("llama4_text", tmp_path / "source", intermediate_size=136)
    refused(source, SchemeError, "do not divide: keep this role in bf16")


def test_nothing_to_quantize(source: Path) -> None:
    refused(source, RecipeError, "nothing to quantize", {"experts": Scheme("bf16")})
    refused(source, RecipeError, "nothing to quantize", {"dense_mlp": Scheme("int4")})  # this model has none


def test_roles_that_stay_as_they_are(source: Path) -> None:
    refused(source, RecipeError, "role 'router' cannot be quantized", {"router": Scheme("int8")})


def test_nf4_beside_int4(source: Path) -> None:
    mixed = {"experts": Scheme("nf4"), "lm_head": Scheme("int8")}
    refused(source, RecipeError, "nf4 and int2 to int8 cannot be mixed", mixed)


def test_a_quantized_source_whose_config_does_not_say_so(source: Path) -> None:
    convert(source, source.parent / "quantized", INT4)
    config = source.parent / "quantized" / "config.json"
    bare = {k: v for k, v in json.loads(config.read_text()).items() if k != "quantization_config"}
    config.write_text(json.dumps(bare))  # its tensors still tell
    refused(source.parent / "quantized", CheckpointError, "has no tensor|already quantized")


def test_a_source_of_fp8_weights(source: Path) -> None:
    change(source, "lm_head.weight", lambda tensor: tensor.to(torch.float8_e4m3fn))
    refused(source, CheckpointError, "tensor lm_head.weight has dtype F8_E4M3.*already quantized")


@pytest.mark.parametrize(
    ("key", "changed"),
    [("num_local_experts", 4), ("intermediate_size", 256), ("hidden_size", 256), ("vocab_size", 512)],
)
def test_tensors_that_disagree_with_the_config(source: Path, key: str, changed: int) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {key: changed}))
    refused(source, CheckpointError, "has shape .* but config.json says .* not of one model")


def test_more_layers_than_the_config_says(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    fewer = {"num_hidden_layers": 2, "layer_types": config["layer_types"][:2], "moe_layers": [0, 1]}
    (source / "config.json").write_text(json.dumps(config | fewer))
    refused(source, CheckpointError, r"has no place in the model that config.json describes \(2 layers, 8 experts\)")


def test_more_experts_than_the_config_says(tiny: Tiny, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny("qwen3_moe"), source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_experts": 4, "num_local_experts": 4}))
    refused(source, CheckpointError, "but config.json says|has no place")


def test_a_tensor_of_no_known_name(source: Path) -> None:
    tensors = load_file(source / "model-00001-of-00003.safetensors")
    tensors["model.layers.0.mystery"] = torch.zeros(2)
    for file in [*source.glob("*.safetensors"), source / "model.safetensors.index.json"]:
        if "00001" not in file.name:
            continue
        save_file(tensors, file, {"format": "pt"})
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.0.mystery"] = "model-00001-of-00003.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(source, CheckpointError, "model.layers.0.mystery is not part of a llama4 model")


def test_a_destination_that_is_not_empty(source: Path) -> None:
    destination = source.parent / "out"
    destination.mkdir()
    (destination / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not empty: choose another destination"):
        convert(source, destination, INT4)
    assert [path.name for path in destination.iterdir()] == ["notes.txt"]


def test_a_destination_that_is_a_file_or_lies_in_the_source(source: Path) -> None:
    (source.parent / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        convert(source, source.parent / "file", INT4)
    with pytest.raises(OutputError, match="lies in the source"):
        convert(source, source / "quantized", INT4)


def test_a_destination_that_cannot_be_made(source: Path) -> None:
    (source.parent / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written: Not a directory"):
        convert(source, source.parent / "file" / "out", INT4)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = (
        os.geteuid() == 0
        and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], check=False, capture_output=True
        ).returncode
        == 0
    )
    if not mounted:
        pytest.skip("cannot mount a small tmpfs here: needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_with_too_little_space_is_refused_up_front(source: Path, small_disk: Path) -> None:
    with pytest.raises(OutputError, match=r"has 2.00 MiB free, but the output needs 2\.\d\d MiB"):
        convert(source, small_disk / "out", INT4)
    assert not list(small_disk.iterdir())


_LIMITED = """
import resource, sys
from pathlib import Path
from quant.convert.convert import convert
from quant.errors import OutputError
from quant.scheme import Scheme
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
try:
    convert(Path(sys.argv[1]), Path(sys.argv[2]), {"experts": Scheme("int4")})
except OutputError as error:
    print(error)
"""


def test_a_disk_that_will_not_hold_the_files_is_refused_before_work_begins(source: Path) -> None:
    command = [sys.executable, "-c", _LIMITED, str(source), str(source.parent / "out")]
    root = Path(__file__).resolve().parents[3]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout
    assert output.startswith("no space left to write") and output.count("\n") == 1
    assert not list(source.parent.glob("out*"))


def test_a_disk_that_fills_up_on_the_way_can_be_resumed(source: Path, tmp_path: Path) -> None:
    disk, undisturbed = tmp_path / "disk", tmp_path / "undisturbed"
    convert(source, undisturbed, INT4)
    disk.mkdir()
    if os.geteuid() != 0:
        pytest.skip("cannot mount a small tmpfs here: needs root")
    size = sum(file.stat().st_size for file in undisturbed.iterdir()) // 4096 * 4096 + 2**20
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size + 2**20}", "tmpfs", str(disk)]
    subprocess.run(mount, check=True, capture_output=True)
    try:

        def fill(done: int, total: int, what: str) -> None:
            if done == total:  # the weights are there: what is left are the small files
                hog = os.open(disk / "hog", os.O_WRONLY | os.O_CREAT)
                with suppress(OSError):
                    while True:
                        os.write(hog, bytes(4096))
                os.close(hog)

        with pytest.raises(OutputError, match=r"no space left .* --resume"):
            convert(source, disk / "out", INT4, progress=fill)
        assert not (disk / "out").exists()
        (disk / "hog").unlink()
        convert(source, disk / "out", INT4, resume=True)
        for file in undisturbed.iterdir():
            assert file.read_bytes() == (disk / "out" / file.name).read_bytes()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
