"""A decorator that gives a command a group of options, written once, and hands it what they make together."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any


def expands(
    name: str, options: Mapping[str, tuple[Any, Any]], make: Callable[..., Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that gives a command ``options`` (name → annotation, default) for parameter ``name``.

    The command is called with what ``make`` makes of their values.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def expanded(**arguments: Any) -> None:
            asked = {option: arguments.pop(option) for option in options}
            command(**{name: make(**asked)}, **arguments)

        own = inspect.signature(command).parameters.values()
        keyword = inspect.Parameter.KEYWORD_ONLY
        kept = [parameter.replace(kind=keyword) for parameter in own if parameter.name != name]
        added = [
            inspect.Parameter(option, keyword, default=default, annotation=annotation)
            for option, (annotation, default) in options.items()
        ]
        expanded.__signature__ = inspect.Signature([*kept, *added])  # type: ignore[attr-defined]
        return expanded

    return decorate


def complete(names: Iterable[str]) -> Callable[[str], list[str]]:
    """What a shell offers for an option: those of ``names`` that begin as what was typed, which stays as it was."""

    def offer(incomplete: str) -> list[str]:  # typer knows its argument by this name
        begun = [name for name in names if name.lower().startswith(incomplete.lower())]
        return [incomplete + name[len(incomplete) :] for name in begun]

    return offer
