"""A model's directory is data: no command runs Python that lies in it, whoever says yes to that on stdin."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.main import COMMANDS
from tests.cli.test_exit_codes import VALID
from tests.commands import invoke
from tests.malicious import make_malicious


@pytest.fixture(scope="module")
def places(
    demo_model: Path, model: Path, tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("malicious")
    text = folder / "text.txt"
    text.write_text("import os\n" * 400)
    return {
        "SRC": shutil.copytree(demo_model, folder / "SRC"),
        "MODEL": shutil.copytree(model, folder / "MODEL"),
        "TINY": shutil.copytree(tiny("llama4_text"), folder / "TINY"),  # an imatrix of the demo model takes a minute
        "TEXT": text,
        "OUT": folder / "routing.json",
        "FOLDER": folder,
        "mini-scout": folder / "MODEL",
    }


@pytest.mark.parametrize("asked_for", ["a tokenizer that transformers has", "a tokenizer of its own"])
@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in ("demo", "serve")])
def test_no_command_runs_a_models_code(places: dict[str, Path], tmp_path: Path, command: str, asked_for: str) -> None:
    here = {**places, "DST": tmp_path / "new", "OUT": tmp_path / "routing.json"}
    marks = []
    for name in ("SRC", "MODEL", "TINY"):
        here[name] = shutil.copytree(places[name], tmp_path / name)
        kept = (here[name] / "tokenizer_config.json").read_text()
        marks.append(make_malicious(here[name]))
        if asked_for == "a tokenizer that transformers has":
            (here[name] / "tokenizer_config.json").write_text(kept)
    here["mini-scout"] = here["MODEL"]
    here["SRC"] = here["TINY"] if command == "quantize" else here["SRC"]
    words = [here.get(word, word) for word in VALID[command]]
    more = {"chat": ["-n", "2"], "quantize": ["--imatrix", here["TEXT"]], "eval": ["--windows", "0"]}
    done = invoke(command, *words, *more.get(command, []), stdin="y\n" * 9)
    assert done.returncode in (0, 1), done.stderr
    assert not any(mark.exists() for mark in marks)
    assert "Traceback" not in done.stderr
    if done.returncode == 1:
        assert "never runs" in done.stderr
