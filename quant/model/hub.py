"""Models by their Hub id: ``owner/name`` is downloaded, or found in the cache, where no such directory is."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

from quant.errors import CheckpointError

_ID = re.compile(r"^[\w.-]+/[\w.-]+(@[\w./-]+)?$")
# Weights in other formats double the download and are never read.
_SKIPPED = ("*.bin", "*.pth", "*.pt", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "original/*")


def resolve_model(model: str | Path) -> Path:
    """The directory of ``model``: itself if it exists, else the Hub's ``owner/name[@revision]``, downloaded.

    Raises CheckpointError if there is neither such a directory nor such a model, or the Hub is out of reach.
    """
    text = str(model)
    return _download(text, ignore_patterns=list(_SKIPPED)) if is_hub_id(text) else Path(text)


def fetch_config(model: str) -> Path:
    """The config.json of the Hub's ``owner/name[@revision]``, without its weights. Raises CheckpointError."""
    return _download(model, allow_patterns=["config.json"]) / "config.json"


def is_hub_id(text: str) -> bool:
    """Whether ``text`` reads as a Hub id and is no path that exists."""
    return not Path(text).exists() and _ID.match(text) is not None


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
