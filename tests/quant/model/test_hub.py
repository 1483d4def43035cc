"""What a user calls a model is found, or called what it is, in one line."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from quant.errors import CheckpointError
from quant.model.hub import is_hub_id, resolve_config, resolve_model
from tests import hostile

Tiny = Callable[..., Path]
IDS = ("meta-llama/Llama-4-Scout-17B-16E", "a/b", "Qwen/Qwen3-30B-A3B@main", "o/n@refs/pr/1", "_x/y.z")
NO_IDS = (
    "models/my--model",
    "hub/models--meta-llama--Llama-4-Scout",
    "models/scout..int4",
    "models/-scout",
    "models/scout-int4.",
    "models/scout.git",
    "models/" + "x" * 120,
    "some/model@",
    "a/b/c",
    "é/x",
    "a b/c",
    "scout",
    "",
)


@pytest.mark.parametrize("name", IDS)
def test_a_hub_id_is_one_where_no_such_path_is(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(name)
    Path(name).mkdir(parents=True)
    assert not is_hub_id(name)


@pytest.mark.parametrize("name", NO_IDS)
def test_what_breaks_the_hubs_rules_is_not_asked_for(name: str) -> None:
    assert not is_hub_id(name)
    said = hostile.refusal(lambda: resolve_model(name))
    assert "a model directory" in said or "Hugging Face model directory" in said
    if "/" in name and name.count("/") == 1:
        assert "no name that a Hub id can have" in said


def test_the_hubs_own_rule_is_ours() -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    for name in (name.partition("@")[0] for name in (*IDS, *NO_IDS) if name.count("/") == 1 and name[-1] != "@"):
        try:
            validate_repo_id(name)
            valid = not name.endswith(".git")
        except HFValidationError:
            valid = False
        assert is_hub_id(name) == valid, name


def test_a_shape_is_no_model_but_a_config() -> None:
    with pytest.raises(CheckpointError, match=r"scout is the name of a shape.*synth scout DST"):
        resolve_model("scout")
    assert resolve_config("scout")["model_type"] == "llama4"


def test_what_lies_there_is_called_by_its_name(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    for name in ("model.gguf", "x.safetensors", "notes.txt", "full/notes.txt"):
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "pipe")
    os.symlink("gone", tmp_path / "link")
    for name, said in {
        "empty": "an empty directory; expected a Hugging Face model directory",
        "full": "no config.json in it",
        "model.gguf": "a GGUF file, which Coldstream does not read; expected a Hugging Face model directory",
        "x.safetensors": "one safetensors file; expected",
        "notes.txt": "a file; expected",
        "pipe": "a named pipe; expected",
        "link": "is a link to gone, which is not there",
    }.items():
        for find in (resolve_model, resolve_config):
            assert said in hostile.refusal(lambda: find(str(tmp_path / name))), (name, find)  # noqa: B023
    assert "a JSON file; expected" in hostile.refusal(lambda: resolve_model(tiny("olmoe") / "config.json"))
    assert resolve_config(str(tiny("olmoe") / "config.json")) == resolve_config(str(tiny("olmoe")))


def test_a_pipe_for_a_config_is_not_waited_for(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny("olmoe"), tmp_path / "model")
    (tmp_path / "model" / "config.json").unlink()
    os.mkfifo(tmp_path / "model" / "config.json")
    assert "config.json is a named pipe" in hostile.refusal(lambda: resolve_config(str(tmp_path / "model")))
