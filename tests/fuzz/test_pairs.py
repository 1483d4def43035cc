"""The script that tries pairs of options knows all of them."""

from typing import Any

import pytest
import typer

from cli.main import build_app
from tests.fuzz.pairs import OPTIONS


@pytest.mark.parametrize("command", OPTIONS)
def test_every_option_has_values_to_be_tried(command: str) -> None:
    group: Any = typer.main.get_command(build_app(command))
    options = [parameter for parameter in group.commands[command].params if parameter.param_type_name == "option"]
    missing = [option.opts[0] for option in options if not {*option.opts} & {*OPTIONS[command], "--help", "--port"}]
    assert not missing
