"""Killed or failed at any system call, a conversion is resumed to the same bytes.

A sample of the calls; `python -m tests.faults.trials` goes through all of them.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import make
from tests.faults.trials import run

OPTIONS = ["--experts", "int4", "--attention", "int8", "--rounding", "rtn"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler to build the library that disturbs system calls with")
    return make("llama4_text", tmp_path_factory.mktemp("small") / "source", num_hidden_layers=2, num_local_experts=2)


@pytest.fixture(scope="module")
def smallest(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So small that measuring takes no time."""
    widths: dict[str, Any] = dict.fromkeys(("hidden_size", "head_dim", "intermediate_size"), 32)
    heads: dict[str, Any] = {"num_attention_heads": 1, "num_key_value_heads": 1}
    folder = tmp_path_factory.mktemp("tiny") / "source"
    return make("mixtral", folder, num_hidden_layers=1, num_local_experts=2, **widths, **heads)


def test_a_run_disturbed_at_any_call_on_its_destination_is_resumed_to_the_same_bytes(
    small: Path, tmp_path: Path
) -> None:
    found = run(
        small, tmp_path / "trials", OPTIONS, "--how", "kill", "eio", "full", "int", "--in-turn", "--every", "17"
    )
    assert found["code"] == 0 and found["calls"] > 200 and found["trials"] > 10
    assert not found["failures"], found["failures"]


def test_a_run_whose_source_cannot_be_read_for_a_while_is_resumed_to_the_same_bytes(
    small: Path, tmp_path: Path
) -> None:
    found = run(small, tmp_path / "trials", OPTIONS, "--on", "source", "--how", "eio", "--every", "61")
    assert found["code"] == 0 and found["calls"] > 100
    assert not found["failures"], found["failures"]


@pytest.mark.parametrize(
    "options",
    [
        "--target-bits 5 --calibrate {text} --tune 1",
        "--target-bits 5 --imatrix {text} --save-imatrix {{folder}}/matrix.safetensors",
    ],
    ids=["calibrated and tuned", "by importance"],
)
def test_a_run_that_measures_first_is_resumed_to_the_same_bytes(smallest: Path, tmp_path: Path, options: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("to be, or not to be: that is the question\n" * 30)
    words = [word.format(text=text) for word in options.split()]
    found = run(
        smallest,
        tmp_path / "trials",
        [*words, "--group-size", "32"],
        "--how",
        "kill",
        "eio",
        "full",
        "int",
        "--every",
        "67",
    )
    assert found["code"] == 0 and found["calls"] > 200 and found["trials"] >= 3
    assert not found["failures"], found["failures"]
