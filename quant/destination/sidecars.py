"""The files of a checkpoint that are not weights: config, tokenizer, templates, processors, licences."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from quant.errors import CheckpointError
from quant.input_file import kind_of, why_unreadable
from quant.model.config import put_right
from quant.output_file import write_file, writing
from quant.sizes import format_size

_INDEX = ".index.json"  # of weights: the output has its own
_TOKENIZER = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens")
_VOCABULARIES = (".model", ".tiktoken", ".spm")
_TEXTS = (".json", ".txt", ".md", ".jinja", ".py", ".yaml", ".yml", ".rst")
_TERMS = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "COPYRIGHT", "README", "USE_POLICY")
_FOLDERS = ("additional_chat_templates",)  # what transformers looks into, beside the folder itself
_VOCABULARY_BYTES = 256 * 2**20
_TEXT_BYTES = 8 * 2**20  # more is data, not description
_NAMED = 6


def sidecars(source: Path) -> Iterator[Path]:
    """Paths, relative to ``source``, of the files that travel with the weights, config.json apart.

    What describes a model does: tokenizer, processor, chat template, generation config, code, terms and other
    small texts. Weights in whatever form, data, pictures, hidden files and folders do not.
    """
    for path in sorted(source.iterdir()):
        if path.name in _FOLDERS and path.is_dir():
            yield from (inner.relative_to(source) for inner in sorted(path.iterdir()) if _belongs(inner))
        elif path.name != "config.json" and _belongs(path):
            yield path.relative_to(source)


def left_out(source: Path, weights: Iterable[Path]) -> str | None:
    """A note on what is in ``source`` and does not travel, ``weights`` and hidden files apart; None if
    nothing is, or ``source`` is a file by itself."""
    if not source.is_dir():
        return None
    known = {source / "config.json", *(source / path for path in sidecars(source)), *weights}
    named: dict[str, tuple[int, int]] = {}
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or path in known or path.name.endswith(_INDEX) or not path.is_file():
            continue
        name = relative.parts[0] + ("/" if len(relative.parts) > 1 else "")
        files, nbytes = named.get(name, (0, 0))
        named[name] = files + 1, nbytes + path.stat().st_size
    if not named:
        return None
    shown = [f"{name} ({files} files)" if files > 1 else name for name, (files, _) in named.items()]
    more = f" and {len(shown) - _NAMED} more" if len(shown) > _NAMED else ""
    size = format_size(sum(nbytes for _, nbytes in named.values()))
    return f"not copied, {size} that a quantized checkpoint has no use for: {', '.join(shown[:_NAMED])}{more}"


def _belongs(path: Path) -> bool:
    name = path.name
    if name.startswith(".") or name.endswith(_INDEX):
        return False
    limit = _VOCABULARY_BYTES if _is_tokenizer(name) else _TEXT_BYTES
    described = _is_tokenizer(name) or name.endswith(_TEXTS) or name.upper().startswith(_TERMS)
    return described and _is_file(path) and path.stat().st_size <= limit


def _is_tokenizer(name: str) -> bool:
    return name.endswith(_VOCABULARIES) or (name.startswith(_TOKENIZER) and name.endswith(_TEXTS))


def _is_file(path: Path) -> bool:
    """False for a directory. Raises CheckpointError for what should be a file and cannot be read as one, for
    example a link of the Hub's cache to what was never downloaded."""
    try:
        kind = kind_of(path)
    except OSError as error:
        raise CheckpointError(f"{path} {why_unreadable(path, error)}") from None
    if kind not in (None, "a directory"):
        raise CheckpointError(f"{path} is {kind}: expected a file")
    return kind is None


def tokenizer_files(folder: Path) -> Iterator[Path]:
    """The files of the tokenizer and the chat templates in ``folder``. Raises CheckpointError, naming it, for one
    that cannot be read as a file."""
    try:
        found = sorted(folder.iterdir())
        inner = [path for name in _FOLDERS if (folder / name).is_dir() for path in sorted((folder / name).iterdir())]
    except OSError as error:
        raise CheckpointError(f"{folder} {why_unreadable(folder, error)}") from None
    named = [path for path in found if _is_tokenizer(path.name) or path.name.startswith("chat_template")]
    yield from (path for path in [*named, *inner] if _is_file(path))


def sidecar_bytes(source: Path) -> int:
    """Bytes of the sidecars of ``source``."""
    return sum((source / path).stat().st_size for path in sidecars(source))


def copy_sidecars(source: Path, destination: Path, paths: Iterable[Path]) -> None:
    """Copy the sidecars ``paths`` of ``source``; links are followed.

    Raises OutputError, and CheckpointError if one cannot be read.
    """
    for path in paths:
        try:
            data = (source / path).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{source / path} cannot be read: {error.strerror}") from None
        with writing(destination / path):
            (destination / path).parent.mkdir(parents=True, exist_ok=True)
        write_file(destination / path, data)


def write_config(destination: Path, config: dict[str, Any], quantization_config: dict[str, Any]) -> None:
    """Write config.json with ``quantization_config``; what transformers would refuse was put right when
    ``config`` was read."""
    made = put_right({**config, "quantization_config": quantization_config})
    write_file(destination / "config.json", json.dumps(made, indent=2).encode() + b"\n")
