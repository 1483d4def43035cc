"""What the package says of itself holds: dependencies, pins, direction of imports, size of modules."""

import ast
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("quant", "offload", "cli")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {
        canonicalize_name(name): Version(version)
        for name, version in (line.split("==") for line in lines if not line.startswith("#"))
    }


def requirements() -> list[Requirement]:
    optional = PROJECT["optional-dependencies"]["test"]
    return [Requirement(text) for text in [*PROJECT["dependencies"], *optional]]


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


def test_every_dependency_is_pinned_within_its_range() -> None:
    for requirement in requirements():
        assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)]), requirement


def test_pins_are_closed_under_what_the_pinned_packages_require() -> None:
    for name in pins():
        for text in metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                pin = pins().get(canonicalize_name(requirement.name))
                if pin is None and "+cpu" not in metadata.version("torch") and name == "torch":
                    continue  # a CUDA build pins its own nvidia packages, each release to the digit
                assert pin is not None, f"{name} requires {text}, which constraints.txt does not pin"
                assert requirement.specifier.contains(pin), f"{name} requires {text}"


def test_torch_is_pinned_without_a_local_version() -> None:
    """So that the CPU build and the CUDA builds of one release all satisfy the pin."""
    assert pins()["torch"].local is None


def test_third_party_imports_are_declared_dependencies() -> None:
    optional = PROJECT["optional-dependencies"]["video"]  # imported where a video is read, and only then
    declared = {canonicalize_name(Requirement(text).name) for text in [*PROJECT["dependencies"], *optional]}
    indirect = {"tokenizers", "huggingface-hub"}  # transformers cannot do without them, nor be replaced
    indirect.add("triton")  # CUDA builds of torch bring it; imported to launch a kernel, and only then
    ours, named = {*PACKAGES, "recipes"}, {"PIL": "pillow"}
    for path in MODULES:
        for name in set(imports(path)) - set(sys.stdlib_module_names) - ours:
            assert canonicalize_name(named.get(name, name)) in declared | indirect, (
                f"{path.relative_to(ROOT)} imports {name}"
            )


def test_no_module_is_over_350_lines() -> None:
    files = [*MODULES, *(ROOT / "recipes").rglob("*.py"), *(ROOT / "quant").rglob("*.cpp")]
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert not {name: lines for name, lines in long.items() if lines > 350}


def test_no_folder_has_more_than_fifteen_modules() -> None:
    """A room that a newcomer takes in at a glance; ``lint-imports`` (make lint) holds the arrows between them."""
    rooms = Counter(str(path.parent.relative_to(ROOT)) for path in MODULES if path.name != "__init__.py")
    assert not {name: count for name, count in rooms.items() if count > 15}


def test_command_line_is_built_without_importing_torch() -> None:
    program = "import sys, cli.main; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_make_says_what_is_missing_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    for broken, expected in {
        "PYTHON=/no/such/python": "needs Python 3.11 or later",
        "CXX=no-such-compiler": "needs a C++ compiler, found no 'no-such-compiler'",
    }.items():
        done = subprocess.run(["make", "-s", "demo", broken], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode != 0
        assert done.stderr.count(expected) == 1, done.stderr
        assert not (tmp_path / ".venv").exists()
