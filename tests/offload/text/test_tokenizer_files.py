"""A tokenizer's files are those of one, or named in one line; the Rust library never takes the process with it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offload.text.tokenizer import encode, load_tokenizer
from offload.text.tokenizer_files import check_tokenizer_files, plain_tokenizer
from quant.convert.convert import convert
from quant.errors import CheckpointError
from quant.scheme import Scheme
from tests import hostile
from tests.faults.trials import build

Tiny = Callable[..., Path]
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture
def folder(demo_model: Path, tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    for name in FILES:
        shutil.copy(demo_model / name, made)
    return made


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model_max_length", "many", "model_max_length is 'many': expected a valid number"),
        ("model_max_length", [], "model_max_length is []"),
        ("bos_token", 5, "bos_token.str is 5: expected a valid string"),
        ("bos_token", {"text": "x"}, "bos_token"),
        ("added_tokens_decoder", {"-1": {"content": "x"}}, "added_tokens_decoder.-1"),
        ("added_tokens_decoder", {"99999999999": {"content": "x"}}, "added_tokens_decoder.99999999999"),
        ("added_tokens_decoder", {"1": "x"}, "added_tokens_decoder.1 is 'x': expected an object"),
        ("padding_side", "up", "padding_side is 'up': expected 'left' or 'right'"),
        ("tokenizer_class", ["x"], "tokenizer_class is ['x']"),
        ("chat_template", [{"name": "x"}], "chat_template"),
    ],
)
def test_a_value_that_no_tokenizer_has_is_named(folder: Path, key: str, value: Any, said: str) -> None:
    hostile.edit_json(folder / "tokenizer_config.json", lambda config: config.update({key: value}))
    refused = hostile.refusal(lambda: load_tokenizer(folder))
    assert "tokenizer_config.json" in refused and said in refused


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_tokenizer_config_may_be_anything(folder: Path, demo_model: Path, data: st.DataObject) -> None:
    said = json.loads((demo_model / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(data.draw(hostile.mutations(said))))
    hostile.refusal(lambda: encode(load_tokenizer(folder), "hello"))


@pytest.mark.parametrize("name", FILES)
def test_a_pipe_is_not_waited_for(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert f"{name} is a named pipe: expected a file" in hostile.refusal(lambda: load_tokenizer(folder))


@pytest.mark.parametrize("name", FILES)
def test_a_link_to_what_was_never_downloaded_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to("../../blobs/0a1b")
    assert f"{name} is a link to ../../blobs/0a1b, which is not there" in hostile.refusal(
        lambda: load_tokenizer(folder)
    )


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "LICENSE", "vocab.json"])
def test_a_model_is_not_quantized_without_a_file_that_belongs_to_it(tiny: Tiny, tmp_path: Path, name: str) -> None:
    shutil.copytree(tiny("olmoe"), tmp_path / "source")
    (tmp_path / "source" / name).unlink(missing_ok=True)
    (tmp_path / "source" / name).symlink_to("../../blobs/0a1b")
    with pytest.raises(CheckpointError, match=rf"{name} is a link to ../../blobs/0a1b"):
        convert(tmp_path / "source", tmp_path / "out", {"experts": Scheme("int8")})
    assert not (tmp_path / "out").exists()


def test_a_panic_of_the_library_is_one_line(folder: Path) -> None:
    """In a process of its own: a second panic would end this one."""
    hostile.edit_json(
        folder / "tokenizer.json", lambda tokenizer: tokenizer["model"].update(continuing_subword_prefix="a/b")
    )
    program = (
        "from pathlib import Path; from offload.text.tokenizer import load_tokenizer\n"
        "from tests.hostile import refusal\n"
        f"print(refusal(lambda: load_tokenizer(Path({str(folder)!r}))))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "the tokenizers library cannot use this tokenizer.json" in done.stdout


def test_what_is_no_tokenizer_says_why(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    for read in (plain_tokenizer, load_tokenizer):
        with pytest.raises(CheckpointError, match="tokenizer"):
            read(folder)
    check_tokenizer_files(folder)  # JSON that only the library reads


def test_public_configs_that_transformers_refuses_have_a_tokenizer_all_the_same(folder: Path) -> None:
    hostile.edit_json(folder / "config.json", lambda config: config.update(attn_temperature_tuning=4))
    assert encode(load_tokenizer(folder), "hello")


_FAILING = """
import ctypes, errno, os, sys
from pathlib import Path
from offload.text.tokenizer import encode, load_tokenizer
from quant.errors import ColdstreamError
library, folder = ctypes.CDLL(os.environ["LD_PRELOAD"]), Path(sys.argv[1])
library.fault_calls.restype = ctypes.c_long
arm = lambda how, at: library.fault_arm(f"{folder}/".encode(), how, ctypes.c_long(at), errno.EIO, 0)
once, count, off = 3, 1, 0
text = "def read(path):\\n    return [[user]] [assistant]"
arm(count, 0)
usual = load_tokenizer(folder)
calls, refused = library.fault_calls(), 0
expected = (encode(usual, text), usual.chat_template)
for at in range(1, calls + 1):
    arm(once, at)
    try:
        found = load_tokenizer(folder)
    except (ColdstreamError, OSError):  # main makes a line of either
        refused += 1
    else:
        arm(off, 0)
        assert (encode(found, text), found.chat_template) == expected, f"call {at} of {calls}"
assert calls > 50 and refused > 30, (calls, refused)
"""


def test_a_disk_that_fails_once_never_makes_another_tokenizer(folder: Path, tmp_path: Path) -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler to build the library that disturbs system calls with")
    environment = {**os.environ, "LD_PRELOAD": str(build(tmp_path))}
    done = subprocess.run([sys.executable, "-c", _FAILING, folder], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
