"""A conversation as a file: what /save writes, and what --resume goes on with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from offload.documents import SCHEMA_VERSION, to_json
from quant.errors import InputError
from quant.input_file import read_object, validated
from quant.output_file import check_output, save_output

_MARK = b'"command": "chat", "messages"'  # in the beginning of every conversation that was saved


class _Turn(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "user", "assistant"]
    content: str
    images: list[str] | None = None
    videos: list[str] | None = None


class _Saved(BaseModel):
    command: Literal["chat"]
    messages: list[_Turn]


def save_conversation(messages: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the conversation as JSON, over an earlier one if need be. Raises OutputError."""
    document = {"schema_version": SCHEMA_VERSION, "command": "chat", "messages": messages}
    save_output(path, f"{to_json(document)}\n".encode(), _MARK)


def read_conversation(path: Path) -> list[dict[str, Any]]:
    """The messages of the conversation in ``path``; none if there is no such file, which may then be written.

    Raises InputError for a file that holds no conversation, OutputError for one that cannot be written.
    """
    check_output(path, "--resume", _MARK)
    if not path.exists() or not path.stat().st_size:
        return []
    saved = validated(_Saved, read_object(path, "a conversation that chat saved", InputError), str(path), InputError)
    return [turn.model_dump(exclude_none=True) for turn in saved.messages]
