"""A GGUF model as a source checkpoint: names and config of its family, rows when read, a tokenizer beside them."""

import shutil
import tempfile
import weakref
from functools import cached_property
from pathlib import Path
from typing import Any

from quant.architecture.shape import shape_of
from quant.checkpoint.checkpoint import Checkpoint
from quant.checkpoint.file_states import FileStates
from quant.destination.sidecars import copy_sidecars, tokenizer_files
from quant.errors import CheckpointError
from quant.input_file import short
from quant.sources.checkpoint import SourceCheckpoint
from quant.sources.gguf_config import DIRECTORY, gguf_config
from quant.sources.gguf_file import GgufFile, read_gguf
from quant.sources.gguf_names import ROPE, gguf_weights, of_ignored_layers, stored_entries


class GgufCheckpoint(SourceCheckpoint):
    """The model of ``file``. ``directory`` has what GGUF lacks; its files go into the output as they are."""

    def __init__(self, file: GgufFile, directory: Path | None) -> None:
        states = FileStates.of_folder(file.path.parent)
        config = gguf_config(file, directory)
        entries = stored_entries(file)
        entries.pop(ROPE, None)  # the config says it
        ignored = of_ignored_layers(file, shape_of(config))
        kept = {name: entry for name, entry in entries.items() if name not in ignored}
        raw = Checkpoint(file.path, config, kept, states)
        self.gguf, self.directory = file, directory
        super().__init__(raw, gguf_weights(raw, file, raw.shape))

    @classmethod
    def open_file(cls, path: Path, directory: Path | None) -> "GgufCheckpoint":
        """Read the metadata of the first file of a GGUF model. Raises CheckpointError."""
        return cls(read_gguf(path), directory)

    @cached_property
    def files(self) -> list[Path]:
        """See ``CheckpointHeaders``."""
        return sorted({tensor.file for tensor in self.gguf.tensors.values()})

    def check_unchanged(self, *more: Path) -> None:
        """See ``CheckpointHeaders``: there is no config.json, and what is beside is made here."""
        self.states.check(self.files)

    @cached_property
    def sidecar_folder(self) -> Path:
        """See ``Checkpoint``: the tokenizer's files, of ``directory`` or made of the metadata."""
        made = Path(tempfile.mkdtemp(prefix="coldstream-gguf-"))
        weakref.finalize(self, shutil.rmtree, made, ignore_errors=True)
        if self.directory is not None:
            files = [path.relative_to(self.directory) for path in tokenizer_files(self.directory)]
            if not files:
                raise CheckpointError(f"{self.directory} has no tokenizer: expected tokenizer.json and its like")
            copy_sidecars(self.directory, made, files)
        else:
            _save_tokenizer(self.gguf, made)
        return made


def _save_tokenizer(file: GgufFile, folder: Path) -> None:
    """The tokenizer that the metadata describes, as transformers builds it. Raises CheckpointError where it cannot."""
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    kind, split = (file.metadata.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if kind not in ("llama", "gpt2") or (kind == "gpt2" and split not in (*GGUF_PRE_TOKENIZER_SPLITS, "gpt-2")):
        raise CheckpointError(
            f"{file.path} has a tokenizer of kind {short(kind)}, split like {short(split)}, which is not read from "
            f"GGUF: {DIRECTORY}"
        )
    try:
        load: Any = PreTrainedTokenizerFast.from_pretrained
        load(str(file.path.parent), gguf_file=file.path.name).save_pretrained(folder)
    except BaseException as error:  # whatever a foreign vocabulary makes of it, a panic of the library in Rust, too
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(
            f"{file.path}: its tokenizer cannot be read ({type(error).__name__}: {short(str(error))}): {DIRECTORY}"
        ) from None
