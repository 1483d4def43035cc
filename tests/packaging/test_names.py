"""Two things never share a name: whoever searches for one finds it, and nothing else."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("quant", "offload", "cli")
DIALECTS = ROOT / "cli" / "serve"  # a module per dialect of the server, each in the words of its protocol
ALLOWED = {
    "Message": "a turn of a chat: as a template is given it, with its images, and as a report keeps it",
    "main": "what a module does that is run as a program",
    "text": "in cli.schemas a JSON Schema type, on a page escaped text: each is the word of its trade",
    "number": "in cli.schemas a JSON Schema type, elsewhere a number as people read it",
}


def defined(path: Path) -> Iterator[tuple[str, bool]]:
    """Public names that ``path`` defines at its top, and whether each is a function or a class.

    Not a command's function, which is called like its module, nor the options of one (``Annotated[…]``): nobody
    else uses those. Nor what is another module's under the same name (``LOST = other.LOST``).
    """
    commands = path.parent.name == "commands"
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            if not (commands and node.name == path.stem):
                yield node.name, True
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                names = target.elts if isinstance(target, ast.Tuple) else [target]
                value = ast.unparse(node.value) if node.value else ""
                if not value.startswith("Annotated["):
                    found = [name.id for name in names if isinstance(name, ast.Name)]
                    yield from ((name, False) for name in found if not re.search(rf"\.{name}\b", value))


def places(*packages: str, constants: bool) -> dict[str, list[str]]:
    """Where each public name is defined."""
    found: dict[str, list[str]] = defaultdict(list)
    modules = (path for package in packages for path in (ROOT / package).rglob("*.py") if DIALECTS not in path.parents)
    for path in sorted(modules):
        for name, is_code in dict.fromkeys(defined(path)):
            if not name.startswith("_") and (constants or is_code):
                found[name].append(str(path.relative_to(ROOT)))
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_a_public_name_stands_for_one_thing_in_its_package(package: str) -> None:
    found = places(package, constants=True)
    assert {name: where for name, where in found.items() if len(where) > 1 and name not in ALLOWED} == {}


def test_functions_and_classes_have_names_of_their_own_in_all_packages() -> None:
    found = places(*PACKAGES, constants=False)
    assert {name: where for name, where in found.items() if len(where) > 1 and name not in ALLOWED} == {}


def test_every_name_that_is_allowed_twice_is_there_twice() -> None:
    found = places(*PACKAGES, constants=True)
    assert [name for name in ALLOWED if len(found[name]) < 2] == []
