"""Names that a terminal would act upon, of folders and files, and in what is inside them, are shown as escapes by every
command, whether it does its work or says why not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cli.main import COMMANDS
from tests import hostile
from tests.commands import Finished, invoke

EVIL = "\x1b[2J\x1b]0;x\x07\r\x9b\u202e"
RUN = ("--device", "cpu", "--context", "64")
WORK: dict[str, list[str]] = {
    "quantize": ["SRC", "DST", "--experts", "int4-g32", "--imatrix", "TEXT", "--save-imatrix", "MATRIX"],
    "profile": ["MODEL", "--text", "TEXT", "--tokens", "8", "--out", "OUT", "--trace", *RUN],
    "plan": ["MODEL", "--recipe", "RECIPE"],
    "generate": ["MODEL", EVIL, "-n", "2", "--report", "PAGE", "--recipe", "RECIPE", "--prompt-cache", "DIR", *RUN],
    "chat": ["MODEL", "-n", "2", "--system", EVIL, "--resume", "TALK", *RUN],
    "serve": ["MODEL", "--name", EVIL, "--host", f"a{EVIL}", "--unprotected"],
    "eval": ["MODEL", "--reference", "SRC", "--text", "TEXT", "--windows", "1", "--context", "8", "--cache", "DIR"],
    "bench": ["MODEL", "--prompt-tokens", "8", "--tokens", "8", "--repeat", "1", "--report", "PAGE", *RUN],
    "check": ["MODEL", "--for", "vllm"],
    "synth": ["SRC", "DST", "--experts", "int4-g32"],
    "probe": ["FOLDER"],
    "simulate": ["MODEL", "--tokens", "8", "--prompt", "16", "--report", "PAGE"],
    "rank-policies": ["uniform", "--model", "MODEL", "--tokens", "16"],
}
DONE_ALL_THE_SAME = {"serve": 1}  # there is no such host


@pytest.fixture
def places(demo_model: Path, model: Path, tmp_path: Path) -> dict[str, str]:
    folder = tmp_path / EVIL
    folder.mkdir()
    for name, source in (("SRC", demo_model), ("MODEL", model)):
        shutil.copytree(source, folder / name)
    (folder / "TEXT").write_text(f"{EVIL} to be or not to be\n" * 60)
    (folder / "RECIPE.toml").write_text(f'description = {json.dumps(EVIL)}\n[run]\nram = "1GiB"\n')
    names = {
        name: str(folder / name) for name in ("SRC", "MODEL", "TEXT", "DST", "OUT", "PAGE", "DIR", "MATRIX", "TALK")
    }
    return names | {"FOLDER": str(folder), "RECIPE": str(folder / "RECIPE.toml")}


def shows_escapes(done: Finished) -> None:
    found = {mark for mark in EVIL + "\x00" if not mark.isprintable() and mark in done.stdout + done.stderr}
    assert not found, (found, done.stderr)
    assert "Traceback" not in done.stderr


def test_no_command_is_forgotten() -> None:
    assert WORK.keys() | {"demo"} == COMMANDS.keys()


@pytest.mark.parametrize("command", WORK)
def test_what_stands_in_names_is_shown_as_escapes(places: dict[str, str], command: str) -> None:
    words = [places.get(word, word) for word in WORK[command]]
    done = invoke(command, *words, "-v", stdin=f"{EVIL}\n/save {EVIL}\n")
    assert done.returncode == DONE_ALL_THE_SAME.get(command, 0), done.stderr
    shows_escapes(done)
    shows_escapes(invoke(command, *words[:-1], f"{places['FOLDER']}/not there", stdin=""))


def _tensor(folder: Path) -> None:
    file = min(folder.glob("*.safetensors"))
    header, body = hostile.read_safetensors(file)
    name = max(key for key in header if key != "__metadata__")
    hostile.write_safetensors(file, {EVIL if key == name else key: value for key, value in header.items()}, body)


def _config(folder: Path, *place: str) -> None:
    file = folder / place[0]
    said: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    inner = said
    for key in place[1:-1]:
        inner = inner[key]
    inner[place[-1]] = EVIL
    file.write_text(json.dumps(said))


INSIDE: dict[str, Any] = {
    "a tensor": _tensor,
    "a family": lambda folder: _config(folder, "config.json", "model_type"),
    "a dtype": lambda folder: _config(folder, "config.json", "dtype"),
    "an activation": lambda folder: _config(folder, "config.json", "hidden_act"),
    "a method": lambda folder: _config(folder, "config.json", "quantization_config", "quant_method"),
    "an unknown key": lambda folder: _config(folder, "generation_config.json", EVIL),
    "a token": lambda folder: _config(folder, "tokenizer_config.json", "eos_token"),
    "a template": lambda folder: (folder / "chat_template.jinja").write_text(
        "{{ raise_exception(" + json.dumps(EVIL) + ") }}"
    ),
}


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("command", ["plan", "generate", "check", "quantize", "chat"])
def test_what_stands_in_files_is_shown_as_escapes(places: dict[str, str], command: str, inside: str) -> None:
    for name in ("SRC", "MODEL"):
        INSIDE[inside](Path(places[name])) if (inside, name) != ("a method", "SRC") else None
    words = [places.get(word, word) for word in WORK[command]]
    shows_escapes(invoke(command, *words, stdin="hello\n"))
