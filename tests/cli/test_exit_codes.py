"""0 done, 1 failed, 2 wrong usage: the same of every command and every option, by one table.

Whatever an option is not said to take here, it takes names, numbers or sizes, and refuses others: so that a
new option cannot be forgotten.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from cli.main import COMMANDS, build_app
from tests.commands import invoke

# What makes each command go, where only the one thing asked about is wrong.
VALID: dict[str, list[str]] = {
    "quantize": ["SRC", "DST", "--experts", "int4"],
    "profile": ["MODEL", "--text", "TEXT", "--out", "OUT"],
    "plan": ["MODEL"],
    "generate": ["MODEL", "Hi", "-n", "2"],
    "chat": ["MODEL"],
    "serve": ["MODEL", "--port", "1", "--host", "203.0.113.1", "--unprotected"],  # an address that is not here
    "eval": ["MODEL", "--reference", "SRC", "--text", "TEXT"],
    "bench": ["MODEL"],
    "check": ["MODEL", "--for", "vllm"],
    "synth": ["mini-scout", "DST"],
    "probe": ["FOLDER"],
    "simulate": ["mini-scout", "--tokens", "16"],
    "rank-policies": ["uniform", "--model", "mini-scout", "--tokens", "16"],
    "demo": [],
}
ARGUMENTS = {  # positions in VALID of what must be there
    "quantize": [0],
    "profile": [0],
    "plan": [0],
    "generate": [0],
    "chat": [0],
    "serve": [0],
    "eval": [0, 2],
    "bench": [0],
    "check": [0],
    "synth": [0],
    "probe": [0],
    "simulate": [0],
    "rank-policies": [0, 2],
    "demo": [],
}
EMPTY = {("check", 0), ("probe", 0), ("rank-policies", 0), ("rank-policies", 2)}  # whose parser refuses ""
NAMES = {"recipe", "policy", "gpu", "fit", "experts", "shared_expert", "dense_mlp", "attention", "lm_head"}
FILES = {"draft_model", "text", "calibrate", "imatrix", "routing", "merge", "reference", "model", "trace"}
WRITTEN = {"report", "out", "save_imatrix"}
FREE = {"prompt", "system", "stop", "cache", "keep", "source", "destination", "shape", "directory", "trace"}
FREE |= {"host", "api_key", "allow_host", "allow_origin", "name", "images_from"}
FREE |= {"prompt_cache", "kv_disk", "resume"}  # made where they are not
TEXTS = {"system", "stop"}  # which may be empty
BESIDE = {("quantize", "save_imatrix"): ["--imatrix", "TEXT"], ("quantize", "routing"): ["--target-bits", "6"]}


def parameters(command: str) -> Iterator[Any]:
    group: Any = typer.main.get_command(build_app(command))
    yield from group.commands[command].params


def cases() -> Iterator[tuple[str, list[str], int]]:
    """(command, what is wrong with it, exit code)."""
    for command in COMMANDS:
        for position in ARGUMENTS[command]:
            words = list(VALID[command])
            place = position + words[position].startswith("--")
            yield command, [*words[:place], "ABSENT", *words[place + 1 :]], 1
            code = 2 if (command, place) in EMPTY else 1
            yield command, [*words[:place], "", *words[place + 1 :]], code
        yield command, [*VALID[command], "--no-such-option"], 2
        yield command, [*VALID[command], "--quiet", "--verbose"], 2
        for parameter in parameters(command):
            name, option = parameter.name, parameter.opts[0]
            words = [*VALID[command], *BESIDE.get((command, name), [])]
            if parameter.param_type_name == "argument" or getattr(parameter, "is_flag", False):
                continue
            if name not in TEXTS:
                for empty in ("", " "):
                    yield command, [*words, option, empty], 1 if name == "reference" else 2
            if name in FILES:
                yield command, [*words, option, "ABSENT"], 1
            elif name in WRITTEN:
                yield command, [*words, option, "ABSENT/file"], 1
                for taken in ("FOLDER", "PIPE", "FOREIGN", "/dev/full", "n" * 256):
                    yield command, [*words, option, taken], 1
                yield command, [*words, option, "-"], 2
            elif name not in FREE:  # names, choices, numbers and sizes: no such thing exists
                yield command, [*words, option, "nonsense"], 2
            if parameter.metavar == "SIZE":
                yield command, [*words, option, "64"], 2
                yield command, [*words, option, "9" * 400], 2
            if parameter.type_descriptor.annotation is float:
                yield command, [*words, option, "nan"], 2
                yield command, [*words, option, "inf"], 2
            if name == "recipe":
                yield command, [*words, option, "ABSENT.toml"], 1


@pytest.fixture
def places(there: dict[str, str], tmp_path: Path) -> dict[str, str]:
    return {**there, "DST": str(tmp_path / "new"), "OUT": str(tmp_path / "routing.json")}


@pytest.fixture(scope="module")
def there(demo_model: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("places")
    text = folder / "text.txt"
    text.write_text("import os\n" * 40)
    os.mkfifo(folder / "pipe")
    return {
        "SRC": str(demo_model),
        "MODEL": str(model),
        "TEXT": str(text),
        "FOLDER": str(folder),
        "PIPE": str(folder / "pipe"),
        "FOREIGN": str(text),
        "ABSENT": str(folder / "absent"),
        "ABSENT/file": str(folder / "absent" / "file"),
        "ABSENT.toml": str(folder / "absent.toml"),
    }


@pytest.mark.parametrize(("command", "words", "code"), list(cases()), ids=lambda value: str(value)[-60:])
def test_what_is_wrong_has_the_same_code_everywhere(
    places: dict[str, str], tmp_path: Path, command: str, words: list[str], code: int
) -> None:
    done = invoke(command, *[places.get(word, word) for word in words])
    assert done.returncode == code, done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("coldstream: error: ")]
    assert len(said) == 1, done.stderr
    assert not list(tmp_path.iterdir()), "something was written"


@pytest.mark.parametrize("scheme", ["int5", "nf4-g7", "bf16-g32", "int4-g7", "int4-g"])
@pytest.mark.parametrize("command", ["quantize", "plan", "synth"])
def test_a_scheme_that_is_none_is_refused_with_the_option(places: dict[str, str], command: str, scheme: str) -> None:
    done = invoke(command, *[places.get(word, word) for word in VALID[command]], "--experts", scheme)
    assert done.returncode == 2
    assert f"--experts {scheme}: " in done.stderr


def test_a_recipe_file_with_a_bad_scheme_is_a_failure_that_names_the_key(
    places: dict[str, str], tmp_path: Path
) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[weights]\nexperts = "int5"\n')
    done = invoke("plan", places["MODEL"], "--recipe", recipe, "--json")
    assert done.returncode == 1
    assert "recipe mine: weights.experts: unknown scheme 'int5'" in done.stderr


def test_done_is_0_and_one_document(places: dict[str, str]) -> None:
    done = invoke("plan", places["MODEL"], "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["schemes"]["experts"] == "int4-g128"
