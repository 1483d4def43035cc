"""A model by what a user calls it: a directory, a config.json, a shape's name, or the Hub's ``owner/name``, which is
downloaded, or found in the cache, where no such path is."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

from quant.errors import CheckpointError
from quant.input_file import is_there, kind_of, why_unreadable
from quant.model.config import read_config
from quant.model.known_shapes import load_shape, shape_names

# The Hub's own rule for repositories, and a revision: no double dash or dot, none at either end.
_PART = r"(?!.*(--|\.\.))[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?"
_ID = re.compile(rf"^{_PART}/{_PART}(@[\w./-]+)?$", re.ASCII)
_ID_LENGTH = 96
_LOOKS_LIKE_ID = re.compile(r"^[^/]+/[^/]+$")
# Weights in other formats double the download and are never read.
_SKIPPED = ("*.bin", "*.pth", "*.pt", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "original/*")


def resolve_model(model: str | Path) -> Path:
    """The directory of ``model``, with a config.json in it: itself if it exists, else the Hub's
    ``owner/name[@revision]``, downloaded.

    Raises CheckpointError, saying what it is, if it is neither, or the Hub is out of reach.
    """
    text = str(model)
    if is_hub_id(text):
        path = _download(text, ignore_patterns=list(_SKIPPED))
    elif is_there(text):
        path = Path(text)
    else:
        raise CheckpointError(_unknown(text))
    _check_directory(path)
    return path


def resolve_config(model: str) -> dict[str, Any]:
    """The config of a model directory, a config.json file, a shape's name or a Hub id, of which only the config is
    fetched.

    Raises CheckpointError, saying what it is, if it is none of these or cannot be read.
    """
    if is_hub_id(model):
        return read_config(_download(model, allow_patterns=["config.json"]))
    if is_there(model):
        path = Path(model)
        if path.is_dir() or path.suffix != ".json":
            _check_directory(path)
        return read_config(path)
    if model in shape_names():
        return load_shape(model)
    raise CheckpointError(_unknown(model, f", a config.json or a shape ({', '.join(shape_names())})"))


def is_hub_id(text: str) -> bool:
    """Whether ``text`` is a Hub id by the Hub's own rule, and no path that exists."""
    name = text.partition("@")[0]
    valid = _ID.match(text) is not None and len(name) <= _ID_LENGTH and not name.endswith(".git")
    return valid and not is_there(text)


def _unknown(text: str, others: str = "") -> str:
    """Why ``text``, which is no path that exists and no Hub id, is no model."""
    if not others and text in shape_names():
        return (
            f"{text} is the name of a shape, which has no weights: expected a model directory or a Hub id; "
            f"`coldstream plan {text}` plans it and `coldstream synth {text} DST` makes it with random weights"
        )
    if _LOOKS_LIKE_ID.match(text):
        return f"{text}: no such directory, and no name that a Hub id can have; expected a model directory{others}"
    return f"{text or repr(text)}: no such directory; expected a Hugging Face model directory{others}"


def _check_directory(path: Path) -> None:
    """Raise CheckpointError, saying what is there, unless ``path`` is a directory with a config.json."""
    try:
        kind = kind_of(path)
        if kind == "a directory":
            if not is_there(path / "config.json"):
                what = "no config.json in it" if next(path.iterdir(), None) is not None else "an empty directory"
                raise CheckpointError(f"{path}: {what}; expected a Hugging Face model directory")
            return
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} {why_unreadable(path, error)}") from None
    formats = {".gguf": "a GGUF file", ".safetensors": "one safetensors file", ".json": "a JSON file"}
    what = kind or formats.get(path.suffix.lower(), "a file")
    remedy = ", which Coldstream does not read" if what == "a GGUF file" else ""
    raise CheckpointError(
        f"{path}: {what}{remedy}; expected a Hugging Face model directory, with config.json and safetensors in it"
    )


def _download(text: str, allow_patterns: list[str] | None = None, ignore_patterns: list[str] | None = None) -> Path:
    from huggingface_hub import snapshot_download

    # Any: it re-exports its HTTP client's errors untyped
    errors: Any = import_module("huggingface_hub.errors")

    name, _, revision = text.partition("@")
    try:
        folder = snapshot_download(
            name, revision=revision or None, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        return Path(folder)
    except errors.HfHubHTTPError as error:
        reason = "it is gated or private: log in with `hf auth login`" if _denied(error) else "check the name"
        raise CheckpointError(
            f"{text}: no such directory, and the Hugging Face Hub has no such model for you: {reason}"
        ) from None
    except (OSError, errors.HTTPError, errors.IncompleteSnapshotError):
        raise CheckpointError(
            f"{text}: no such directory, and the Hugging Face Hub cannot be reached for a model of that "
            "name: check the path or the connection"
        ) from None


def _denied(error: Exception) -> bool:
    response = getattr(error, "response", None)
    return response is not None and response.status_code in (401, 403)
