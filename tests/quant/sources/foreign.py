"""A tiny checkpoint quantized by somebody else: the same model, its Linears as another library writes them."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from quant.sources.open import open_source

Tensors = dict[str, Tensor]
Store = Callable[[Tensor], tuple[Tensors, Tensor]]  # a weight → its tensors by suffix, and what they stand for
LINEARS = re.compile(r"(experts\.\d+\.\w+|_proj|shared_expert\.\w+|lm_head)\.weight$")


def foreign(
    source: Path, folder: Path, store: Store, config: Mapping[str, Any], pattern: re.Pattern[str] = LINEARS
) -> Tensors:
    """Save ``source`` in ``folder`` with the weights that ``pattern`` finds as ``store`` makes them, and ``config`` as
    the ``quantization_config``. Returns what each of those weights stands for."""
    folder.mkdir()
    stored, meant = {}, {}
    for key, value in tensors_of(source).items():
        if pattern.search(key) and "vision" not in key and "projector" not in key:
            parts, meant[key] = store(value)
            stored |= {key.removesuffix("weight") + suffix: part for suffix, part in parts.items()}
        else:
            stored[key] = value
    save(folder, stored)
    made = json.loads((source / "config.json").read_text()) | {"quantization_config": dict(config)}
    (folder / "config.json").write_text(json.dumps(made))
    for file in source.glob("token*"):
        shutil.copy(file, folder)
    return meant


def tensors_of(folder: Path) -> Tensors:
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


def save(folder: Path, tensors: Tensors) -> None:
    save_file(
        {key: value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def edited(folder: Path, copy: Path, edit: Callable[[Tensors], object]) -> Path:
    """A copy of ``folder`` with its tensors changed by ``edit``."""
    shutil.copytree(folder, copy)
    tensors = tensors_of(copy)
    edit(tensors)
    save(copy, tensors)
    return copy


def rows_equal(folder: Path, meant: Tensors) -> None:
    """Every weight is what it stands for, bit for bit, read whole and by some rows."""
    checkpoint = open_source(folder)
    assert not checkpoint.is_quantized
    for key, expected in meant.items():
        found = checkpoint.read(key)
        assert found.shape == expected.shape
        assert (found.to(expected.dtype) == expected).all(), key
        columns = expected.shape[-1]
        part = checkpoint.read(key, 5 * columns * 4, (7, columns))
        assert (part == found.view(-1, columns)[5:12]).all(), key
