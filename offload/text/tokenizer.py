"""The model's own tokenizer, by transformers, and the one way from text to token ids."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from offload.text.chat_template import render_chat
from offload.text.tokenizer_files import TokenizersErrors, check_tokenizer_files, looking_closely
from quant.errors import LIBRARY_ERRORS, CheckpointError, InputError, UsageError
from quant.input_file import is_there
from quant.model.config import read_config
from quant.model.families import family_of

_FILES = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template", "generation_config")


def text_files(path: Path) -> list[Path]:
    """The files in ``path`` that say how text becomes tokens, and which tokens end it."""
    return [file for file in sorted(path.iterdir()) if file.name.startswith(_FILES) and file.is_file()]


def load_tokenizer(path: Path) -> Any:
    """The model's tokenizer; Python code that lies beside it is never run.

    Raises CheckpointError if it cannot be read, or is nothing without that code.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # what it warns of names what it found, as it is
    check_tokenizer_files(path)
    config = _config(path)
    try:
        with TokenizersErrors(str(path)), looking_closely():
            return AutoTokenizer.from_pretrained(path, config=config, local_files_only=True, trust_remote_code=False)
    except (OSError, *LIBRARY_ERRORS) as error:
        raise _unreadable(path, error) from None
    except Exception as error:
        if type(error) is not Exception:  # what the tokenizers library raises for a file that it cannot read
            raise
        raise _unreadable(path, error) from None


def _config(path: Path) -> Any:
    """A config of the model's kind with nothing of its own but what chooses a tokenizer: transformers would refuse
    many a public config.json for keys that no tokenizer has anything to do with. None for a folder without one."""
    from transformers import CONFIG_MAPPING, AutoConfig

    if not is_there(path / "config.json"):
        return None
    said = read_config(path)
    kind = str(said.get("model_type"))
    if kind not in CONFIG_MAPPING:
        family_of(said.get("model_type"))  # refuses what transformers would raise KeyError for
    made: Any = AutoConfig.for_model(kind)
    made._name_or_path = str(path)
    if isinstance(said.get("tokenizer_class"), str):
        made.tokenizer_class = said["tokenizer_class"]
    return made


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of ``text``, with the tokens around it that the tokenizer itself adds.

    A beginning of text that is spelled out is not put there twice. Raises InputError for what is no text.
    """
    ids, bos = encode_text(tokenizer, text), tokenizer.bos_token_id
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


def encode_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    switches: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a conversation, by the model's chat template, up to where the assistant answers. ``tools`` are
    those that it may call, ``switches`` values of the template's own, such as ``enable_thinking``.

    The template has all special tokens that there are. Raises UsageError if the model has no template,
    CheckpointError if it refuses the conversation or is broken, InputError for what is no text.
    """
    return encode_text(tokenizer, chat_text(tokenizer, messages, tools, switches), False)


def chat_text(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    switches: Mapping[str, Any] | None = None,
) -> str:
    """A conversation as the model's chat template puts it; see ``encode_chat``."""
    if not tokenizer.chat_template:
        raise UsageError("this model has no chat template: use `coldstream generate` instead of chat")
    return render_chat(tokenizer.get_chat_template(), messages, tokenizer.special_tokens_map, tools, switches)


def encode_text(tokenizer: Any, text: str, add_special_tokens: bool = True) -> list[int]:
    """Token ids of ``text``. Raises InputError for what is no text, CheckpointError if the tokenizer fails at it."""
    with TokenizersErrors("the text cannot be read"):
        ids: list[int] = tokenizer(_checked(text), add_special_tokens=add_special_tokens, verbose=False).input_ids
    return ids


def check_ids(ids: Sequence[int], rows: int) -> None:
    """Raise CheckpointError if any of ``ids`` is beyond an embedding of ``rows`` rows."""
    most = max(ids, default=0)
    if most >= rows:
        raise CheckpointError(
            f"the tokenizer makes token {most:,} of this text, and the model's embedding ends at {rows - 1:,}: "
            "expected a tokenizer of the same model; take out the tokens that were added to it"
        )


def _checked(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text cannot be read as Unicode: character {error.start} is {text[error.start]!a}, half of a "
            "character or a byte that is no UTF-8; give UTF-8 text"
        ) from None
    return text


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    if "trust_remote_code" in str(error):
        return CheckpointError(
            f"{path}: its tokenizer is Python code of its own, which Coldstream never runs; expected a tokenizer "
            "that transformers itself knows"
        )
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return CheckpointError(f"{path} has no tokenizer that transformers can load: {said}")
