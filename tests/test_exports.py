"""What ``quant`` and ``offload`` export is what they say, and importing them imports nothing."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest


@pytest.mark.parametrize("name", ["quant", "offload"])
def test_every_exported_name_is_there_and_typed(name: str) -> None:
    package = import_module(name)
    tree = ast.parse(Path(str(package.__file__)).read_text())
    typed = [node for branch in tree.body if isinstance(branch, ast.If) for node in ast.walk(branch)]
    imports = {alias.name: node.module for node in typed if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imports == package._MODULES
    assert package.__all__ == sorted(package.__all__)
    for exported in package.__all__:
        assert getattr(package, exported) is getattr(import_module(package._MODULES[exported]), exported)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        package.nothing  # noqa: B018


def test_importing_the_packages_imports_nothing_heavy() -> None:
    code = (
        "import sys, quant, offload; print([m for m in sys.modules if m.split('.')[0] in ('torch', 'numpy', 'rich')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
