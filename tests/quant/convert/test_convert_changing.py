"""A source that changes while it is quantized: what comes out is of one model, or a line that names the file."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant.convert.convert import convert
from quant.errors import CheckpointError, OutputError
from quant.model.families import Role
from quant.scheme import Scheme

Tiny = Callable[..., Path]
Change = Callable[[Path], None]
INT4: dict[Role, Scheme] = {"experts": Scheme("int4")}


def overwrite(file: Path) -> None:
    """Other bytes of the same length, in place."""
    data = bytearray(file.read_bytes())
    data[-4096:] = bytes(4096)
    with file.open("r+b") as stream:
        stream.write(data)


def replace(file: Path) -> None:
    """Another file of the same length under the same name."""
    other = file.with_name("new")
    if file.suffix == ".safetensors":
        save_file({key: torch.zeros_like(tensor) for key, tensor in load_file(file).items()}, other, {"format": "pt"})
    else:
        other.write_bytes(file.read_bytes())
    other.replace(file)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def remove(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("change", [overwrite, replace, cut, remove])
@pytest.mark.parametrize(
    "name", ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "config.json", "tokenizer.json"]
)
def test_a_file_that_changes_is_named_and_nothing_is_published(
    tiny: Tiny, tmp_path: Path, name: str, change: Change
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(tiny("llama4_text", shards=2), source)
    moments = random.Random(name + change.__name__)
    for _ in range(3):
        shutil.rmtree(source)
        shutil.copytree(tiny("llama4_text", shards=2), source)
        calls, when = 0, moments.randrange(1, 80)

        def disturb(done: int, total: int, what: str, when: int = when) -> None:
            nonlocal calls
            calls += 1
            if calls == when:
                change(source / name)

        with pytest.raises(CheckpointError, match=rf"{name} (was|went|ends|is missing|cannot be)") as caught:
            convert(source, out, INT4, progress=disturb, sync_bytes=1)
        assert "\n" not in str(caught.value) and not out.exists()
        shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)


def test_a_run_is_not_resumed_from_a_source_that_has_changed(tiny: Tiny, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(tiny("llama4_text"), source)

    def disturb(done: int, total: int, what: str) -> None:
        if done > total // 2 and not (source / "touched").exists():
            (source / "touched").touch()
            overwrite(source / "model.safetensors")

    with pytest.raises(CheckpointError, match="was overwritten"):
        convert(source, out, INT4, progress=disturb, sync_bytes=1)
    with pytest.raises(OutputError, match="begun with another state of the source"):
        convert(source, out, INT4, resume=True)


def test_files_that_are_no_part_of_the_model_may_change(tiny: Tiny, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny("llama4_text"), source)
    (source / "train.log.gz").write_text("0")

    def disturb(done: int, total: int, what: str) -> None:
        with (source / "train.log.gz").open("a") as stream:
            stream.write("more")

    convert(source, tmp_path / "out", INT4, progress=disturb)
    assert (tmp_path / "out" / "config.json").exists()
