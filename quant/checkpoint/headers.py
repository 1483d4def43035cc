"""A Hugging Face checkpoint by its config and its files' headers: which tensors there are, and where. Needs no
torch, so that a plan can be made of it at once."""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

from quant.checkpoint.file_states import FileStates
from quant.checkpoint.weight_files import INDEX, TensorEntry, model_entries
from quant.errors import CheckpointError
from quant.model.config import quantization_of, read_config
from quant.model.families import TensorName, parse_name
from quant.model.shape import ModelShape


def read_headers(path: Path | str) -> tuple[Path, dict[str, Any], dict[str, TensorEntry], FileStates]:
    """What ``CheckpointHeaders`` is made of: the directory, its config and its tensors, each by itself as it
    should be, and the state of its files before. Raises CheckpointError or UnknownFamilyError."""
    path = Path(path)
    states = FileStates.of_folder(path)
    config = read_config(path)
    ModelShape.from_config(config)  # an unknown family is the clearest thing to say first
    return path, config, model_entries(path), states


class CheckpointHeaders:
    """One model directory: config, shape and the place of every tensor. ``open_headers`` reads them."""

    def __init__(
        self, path: Path, config: dict[str, Any], entries: dict[str, TensorEntry], states: FileStates | None = None
    ) -> None:
        self.path = path
        self.config = config
        self.entries = entries
        self.states = states or FileStates.of_folder(path)
        self.shape = ModelShape.from_config(config)

    @property
    def is_quantized(self) -> bool:
        return quantization_of(self.config) is not None

    @cached_property
    def names(self) -> dict[str, TensorName]:
        """What each key is. Raises CheckpointError for a key the family does not explain."""
        names: dict[str, TensorName] = {}
        for key in self.entries:
            name = parse_name(self.shape.family, key)
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
        """``key``, or the name that the source has for it where that is of the transformers module."""
        family = self.shape.family
        if key in self.entries or family.block == family.runtime_block:
            return key
        other = key.replace(f".{family.block}.", f".{family.runtime_block}.")
        return other if other in self.entries else key

    def canonical(self, key: str) -> str:
        """The key that a quantized checkpoint gives tensor ``key``: the family's name for its MoE block."""
        if self.names[key].role != "router":
            return key
        return key.replace(f".{self.shape.family.runtime_block}.", f".{self.shape.family.block}.")

    def fused_experts(self, layer: int) -> str | None:
        """The key prefix of a layer's fused expert tensors; None where experts are stored one by one."""
        family, prefix = self.shape.family, self.shape.layer_prefix(layer)
        bases = (f"{prefix}{block}.experts." for block in (family.block, family.runtime_block))
        return next((base for base in bases if f"{base}gate_up_proj" in self.entries), None)
