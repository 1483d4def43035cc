"""The model's own tokenizer, by transformers."""

from pathlib import Path
from typing import Any

from quant.errors import UsageError


def load_tokenizer(path: Path) -> Any:
    """The model's tokenizer. Raises MachineError if it cannot be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"{path} has no tokenizer that transformers can load: {str(error).splitlines()[0]}"
        ) from None
