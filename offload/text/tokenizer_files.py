"""The JSON files around a tokenizer, checked before transformers and the tokenizers library are given them.

Both take much of what stands in them as it is, and fail in ways of their own, some of them only at the first
text. A file that cannot be read as one is named, too: a tokenizer without it would be another tokenizer.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter

from quant.destination.sidecars import tokenizer_files
from quant.errors import CheckpointError
from quant.input_file import is_file, read_bytes, read_object, validated

TOKENIZER = "tokenizer.json"
_MOST_BYTES = 256 * 2**20
_PREFIX = re.compile(rb'"continuing_subword_prefix"\s*:\s*"[^"]')
_Id = Annotated[int, Field(ge=0, lt=2**31)]
_IdText = Annotated[str, StringConstraints(pattern=r"^\d{1,9}$")]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class _Added(_Record):
    """A token as ``AddedToken`` is saved."""

    content: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = True
    special: bool = False


_Token = str | _Added


class _Template(_Record):
    name: str
    template: str


class _TokenizerConfig(_Record):
    """tokenizer_config.json, as far as its keys are read by somebody."""

    tokenizer_class: str | None = None
    model_max_length: Annotated[float, Field(ge=0)] | None = None
    bos_token: _Token | None = None
    eos_token: _Token | None = None
    unk_token: _Token | None = None
    pad_token: _Token | None = None
    sep_token: _Token | None = None
    cls_token: _Token | None = None
    mask_token: _Token | None = None
    added_tokens_decoder: dict[_IdText, _Added] = Field(default_factory=dict)
    additional_special_tokens: list[_Token] | None = None
    extra_special_tokens: list[_Token] | dict[str, _Token] | None = None
    chat_template: str | list[_Template] | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    add_prefix_space: bool | None = None
    clean_up_tokenization_spaces: bool | None = None
    split_special_tokens: bool | None = None
    legacy: bool | None = None
    padding_side: Literal["left", "right"] | None = None
    truncation_side: Literal["left", "right"] | None = None
    model_input_names: list[str] | None = None
    name_or_path: str | None = None


_strict = ConfigDict(strict=True)
_CHECKED: dict[str, TypeAdapter[Any]] = {
    "tokenizer_config.json": TypeAdapter(_TokenizerConfig),
    "special_tokens_map.json": TypeAdapter(dict[str, _Token | list[_Token] | None], config=_strict),
    "added_tokens.json": TypeAdapter(dict[str, _Id], config=_strict),
}


def check_tokenizer_files(folder: Path) -> None:
    """Raise CheckpointError, naming it, if a file of the tokenizer or a chat template in ``folder`` cannot be read
    as a file, or has a value that none can have."""
    for path in tokenizer_files(folder):
        if path.name in _CHECKED:
            validated(_CHECKED[path.name], read_object(path, "a part of a tokenizer"), str(path))
        elif path.name == TOKENIZER and _PREFIX.search(read_bytes(path, limit=_MOST_BYTES)):
            # Merges that do not have the prefix make the library panic. transformers tries again in other ways, and
            # a second panic ends the process.
            plain_tokenizer(folder)


def plain_tokenizer(folder: Path) -> Any:
    """The tokenizer.json in ``folder`` as the tokenizers library has it, without what transformers knows beside.

    Raises CheckpointError if it cannot be read.
    """
    from tokenizers import Tokenizer

    file = folder / TOKENIZER
    data = read_bytes(file, limit=_MOST_BYTES)
    try:
        with TokenizersErrors(str(file)):
            return Tokenizer.from_buffer(data)
    except Exception as error:
        if type(error) is not Exception and not isinstance(error, ValueError):  # what the library raises
            raise
        raise CheckpointError(f"{file} is no tokenizer: {' '.join(str(error).split())}") from None


@contextmanager
def looking_closely() -> Iterator[None]:
    """While transformers loads: a file that cannot be looked at is an error.

    transformers asks ``os.path`` for each file of a tokenizer. To that, a file on a disk that fails for once is absent,
    and transformers goes on without it, to another tokenizer.
    """
    usual = os.path.isfile
    vars(os.path)["isfile"] = is_file
    try:
        yield
    finally:
        vars(os.path)["isfile"] = usual


class TokenizersErrors:
    """Turn a panic of the tokenizers library, written in Rust, into a CheckpointError about ``what``. One may be
    entered again and again."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if type(error).__name__ == "PanicException":  # it has no importable class
            raise CheckpointError(
                f"{self._what}: the tokenizers library cannot use this tokenizer.json ({error}); get it again from "
                "where the model is from"
            ) from None
