"""A Hugging Face checkpoint by its config and its files' headers: which tensors there are, and where. Needs no
torch, so that a plan can be made of it at once."""

import hashlib
import json
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from quant.architecture.shape import shape_of
from quant.checkpoint.file_states import FileStates
from quant.checkpoint.weight_files import INDEX, TensorEntry, model_entries
from quant.errors import CheckpointError
from quant.model.config import quantization_of, read_config
from quant.model.families import Projection, TensorName
from quant.model.shape import ModelShape
from quant.model.tensors import FusedForm

FUSED: tuple[Literal["gate_up_proj", "down_proj"], ...] = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class FusedExperts:
    """The tensors that hold all experts of one layer, by name, and how. ``dims`` are H and I."""

    form: FusedForm
    entries: Mapping[str, TensorEntry]
    dims: tuple[int, int]

    def name(self, projection: Projection) -> Literal["gate_up_proj", "down_proj"]:
        """The tensor that ``projection`` is a part of."""
        return "down_proj" if projection == "down_proj" else "gate_up_proj"

    def shape(self, name: str) -> tuple[int, int]:
        """Rows and columns of one expert in tensor ``name``, as transformers' module has it."""
        hidden, inter = self.dims
        rows, columns = (hidden, inter) if name == "down_proj" else (2 * inter, hidden)
        return (columns, rows) if self.form.transposed else (rows, columns)

    def transposed(self, name: str) -> bool:
        """Whether tensor ``name`` holds ``[K, N]``. A file may hold the other form than the module's, which
        transformers turns round."""
        found = self.entries[name].shape[1:]
        return self.form.transposed ^ (found != self.shape(name) and found == self.shape(name)[::-1])

    def window(self, projection: Projection) -> slice:
        """Which of the out features of its tensor are those of ``projection``."""
        inter = self.dims[1]
        if projection == "down_proj":
            return slice(None)
        second = projection == "up_proj"
        if self.form.interleaved:
            return slice(int(second), None, 2)
        return slice(inter, None) if second else slice(0, inter)


def read_headers(path: Path | str) -> tuple[Path, dict[str, Any], dict[str, TensorEntry], FileStates]:
    """What ``CheckpointHeaders`` is made of: the directory, its config and its tensors, each by itself as it
    should be, and the state of its files before. Raises CheckpointError or UnknownFamilyError."""
    path = Path(path)
    states = FileStates.of_folder(path)
    config = read_config(path)
    shape_of(config)  # an unknown family is the clearest thing to say first
    return path, config, model_entries(path), states


class CheckpointHeaders:
    """One model directory: config, shape and the place of every tensor. ``open_headers`` reads them."""

    def __init__(
        self, path: Path, config: dict[str, Any], entries: dict[str, TensorEntry], states: FileStates | None = None
    ) -> None:
        self.path = path
        self.config = config
        self.states = states or FileStates.of_folder(path)
        self.shape: ModelShape = shape_of(config)
        self.entries = {key: entry for key, entry in entries.items() if not self.shape.is_ignored(key)}
        self.ignored = sorted(entries.keys() - self.entries.keys())  # of parts that transformers leaves out

    @property
    def is_quantized(self) -> bool:
        return quantization_of(self.config) is not None

    @cached_property
    def names(self) -> dict[str, TensorName]:
        """What each key is. Raises CheckpointError for a key the family does not explain."""
        names: dict[str, TensorName] = {}
        for key in self.entries:
            name = self.shape.parse_name(key)
            if name is None:
                raise CheckpointError(
                    f"{self.path}: tensor {key} is not part of a {self.shape.family.name} model: expected "
                    "the key layout that transformers saves"
                )
            names[key] = name
        return names

    @cached_property
    def identity(self) -> str:
        """A hash over the config and every header: 16 hex digits that change when a tensor's place or the
        architecture does, cheap enough to take at every start."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for key in sorted(self.entries):
            entry = self.entries[key]
            digest.update(f"{key}{entry.dtype}{entry.shape}{entry.offset}{entry.file.name}".encode())
        return digest.hexdigest()[:16]

    @cached_property
    def files(self) -> list[Path]:
        """The files that hold tensors."""
        return sorted({entry.file for entry in self.entries.values()})

    def check_unchanged(self, *more: Path) -> None:
        """Raise CheckpointError, naming it, if a file of the model, or one of ``more`` beside them, is no longer
        in the state that it was in when the checkpoint was opened."""
        config, index = self.path / "config.json", self.path / INDEX
        self.states.check([config, *([index] if index.exists() else []), *self.files, *more])

    def entry(self, key: str) -> TensorEntry:
        """The entry of ``key``. Raises CheckpointError if the checkpoint lacks it."""
        try:
            return self.entries[key]
        except KeyError:
            raise CheckpointError(f"{self.path} has no tensor {key}: expected it for this architecture") from None

    def find(self, key: str) -> TensorEntry:
        """The entry of ``key``, also where the source names the MoE block as the transformers module does.

        Raises CheckpointError if the checkpoint lacks it under both names.
        """
        return self.entry(self.alias(key))

    def alias(self, key: str) -> str:
        """``key``, or the name that the source has for the same tensor."""
        if key in self.entries:
            return key
        return self._by_place.get(self.shape.place(key), key)

    @cached_property
    def _by_place(self) -> dict[Hashable, str]:
        return {self.shape.place(key): key for key in self.entries}

    def canonical(self, key: str) -> str:
        """The key that a quantized checkpoint gives tensor ``key``."""
        return self.shape.saved_key(key)

    def fused_experts(self, layer: int) -> FusedExperts | None:
        """A layer's fused expert tensors; None where experts are stored one by one."""
        form, keys = self.shape.fused_form(layer), {}
        for name in (*FUSED, *(f"{name}_bias" for name in FUSED if form.has_bias)):
            keys[name] = self.alias(form.base + name)
        if keys["gate_up_proj"] not in self.entries:
            return None
        return FusedExperts(
            form,
            {name: self.entry(key) for name, key in keys.items()},
            (self.shape.hidden_size, self.shape.expert_intermediate),
        )
