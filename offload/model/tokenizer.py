"""The model's own tokenizer, by transformers."""

from pathlib import Path
from typing import Any

from quant.errors import CheckpointError


def load_tokenizer(path: Path) -> Any:
    """The model's tokenizer. Raises CheckpointError if it cannot be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} has no tokenizer that transformers can load: {str(error).splitlines()[0]}"
        ) from None
