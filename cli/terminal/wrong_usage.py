"""What is wrong with the words of a command, in one line: what was found, what was expected, where to look."""

from typing import Any

import typer

WRONG_USAGE: Any = typer.BadParameter.__mro__[2]  # typer's ClickException, which it does not export
_EXPECTED = {
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a whole number of fewer digits",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_parsing": "true or false",
    "greater_than_equal": "{ge:,g} or more",
    "greater_than": "more than {gt:,g}",
    "less_than_equal": "{le:,g} or less",
    "less_than": "less than {lt:,g}",
}  # of pydantic's errors, which reads values for typer


def usage_line(error: Any) -> str:
    """``error``, a WRONG_USAGE, as one line without a full stop."""
    context = getattr(error, "ctx", None)
    said = " ".join((_of_a_value(error) or error.format_message()).split()).rstrip(".")
    if said.startswith(("Missing ", "Got ", "No such ", "Option ")):
        said = said[0].lower() + said[1:]
    if context is None:
        return said
    if said.startswith(("missing ", "got unexpected ")):
        usage = " ".join(context.get_usage().split()).removeprefix("Usage: ").replace("{", "").replace("}", "")
        said += f": expected {usage}"
    return f"{said}; see `{context.command_path} --help`"


def _of_a_value(error: Any) -> str | None:
    """What is said of an option's value; None of other errors."""
    parameter = getattr(error, "param", None)
    if parameter is None or not isinstance(error, typer.BadParameter) or not error.message:
        return None
    name = max(parameter.opts, key=len)
    if not name.startswith("-"):
        name = (parameter.metavar or name.upper()).strip("[]")
    details: list[Any] = getattr(error.__cause__, "errors", list)()
    if details:
        kind, found, context = details[0]["type"], details[0].get("input"), details[0].get("ctx", {})
        if kind in _EXPECTED:
            return f"{name} {found}: expected {_EXPECTED[kind].format(**context)}"
    return f"{name}: {error.message.removeprefix('Value error, ')}"
