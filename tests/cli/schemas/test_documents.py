"""The schemas that are shipped, and docs/json.md, say what the definitions say. That real documents are like that
is checked wherever a test runs a command with --json (tests/commands.py).
"""

from importlib.resources import files

import jsonschema
import pytest

from cli.main import COMMANDS
from cli.schemas.documents import DOCUMENTS, schema, schema_text, tables
from tests.commands import ROOT


def test_every_command_has_a_schema_and_failures_too() -> None:
    assert DOCUMENTS.keys() == {*COMMANDS, "error"}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_what_is_shipped_is_what_is_defined(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(schema(name))
    written = files("cli.schemas").joinpath(f"{name}.json").read_text(encoding="utf-8")
    assert written == schema_text(name), "python -m cli.schemas.documents writes it"


def test_the_page_has_the_tables() -> None:
    page = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    assert page.endswith(tables()), "python -m cli.schemas.documents writes them"
