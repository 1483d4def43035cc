"""generation_config.json says what ends a text and how it is drawn, or is refused."""

import json
from pathlib import Path

import pytest

from quant.model.generation_config import read_generation_config
from tests import hostile

GOOD = {"eos_token_id": [1, 2], "do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "_from_model": 1}


def test_what_it_says_is_read(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path).ends == frozenset()
    (tmp_path / "generation_config.json").write_text(json.dumps(GOOD))
    found = read_generation_config(tmp_path)
    assert (found.ends, found.temperature, found.top_p, found.top_k) == ({1, 2}, 0.6, 0.9, 20)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert read_generation_config(tmp_path).ends == {7}


def test_every_value_may_be_anything(tmp_path: Path) -> None:
    for _, made in hostile.changed(GOOD):
        (tmp_path / "generation_config.json").write_text(json.dumps(made))
        hostile.refusal(lambda: read_generation_config(tmp_path).ends)


@pytest.mark.parametrize("value", ["1", -5, [[1]], {"a": 1}, 1.0, True])
def test_an_end_that_is_no_token_is_refused(tmp_path: Path, value: object) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    assert "generation_config.json: eos_token_id" in hostile.refusal(lambda: read_generation_config(tmp_path))
