"""Text and paths that are typed as arguments: text is UTF-8, whatever the locale says, and a path has a name."""

import os
from pathlib import Path

import typer

from quant.errors import InputError, UsageError
from quant.sizes import parse_size


def typed_text(value: str | None) -> str | None:
    """``value`` as text: its bytes are UTF-8, or else what the locale makes of them.

    Python reads an argument by the locale, and keeps bytes that the locale does not know as half characters.
    Raises InputError for those that are not UTF-8 either.
    """
    if value is None:
        return None
    data = os.fsencode(value)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        if any("\ud800" <= character <= "\udfff" for character in value):
            found = f"byte {error.start} of it is {data[error.start]:#x}"
            raise InputError(f"an argument is not UTF-8 text: {found}; give UTF-8, or the text through stdin") from None
    return value


def typed_texts(values: list[str] | None) -> list[str]:
    """Each of ``values`` as text; none for None. Raises InputError as ``typed_text`` does."""
    return [text for value in values or () if (text := typed_text(value)) is not None]


def typed_name(value: str) -> str:
    """``value`` unless it is empty: then most often a variable of a script was not set, and without the option
    something else would be meant. Raises typer.BadParameter."""
    if not value.strip():
        raise typer.BadParameter("found an empty name: leave the option out, or give one")
    return value


def typed_path(value: str | Path) -> Path:
    """``value`` as a path. Raises typer.BadParameter for an empty one, which Python takes for the folder one stands
    in."""
    return Path(typed_name(str(value)))


def typed_size(value: str | int) -> int:
    """``value`` in bytes. Raises typer.BadParameter, which names the option, for what is no size."""
    if isinstance(value, int):
        return value
    try:
        return parse_size(value)
    except UsageError as error:
        raise typer.BadParameter(str(error)) from None
