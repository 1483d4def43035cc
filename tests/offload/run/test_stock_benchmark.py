"""What transformers and accelerate make of a directory is measured apart, bounded in time; failing is found, too."""

from pathlib import Path

import pytest

from offload.run.stock_benchmark import StockBenchmark
from quant.convert.quantize import quantize
from quant.scheme import Scheme
from tests.family_checkpoints import make_family

PROMPT = [(i * 37 + 11) % 200 for i in range(24)]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family("llama", tmp_path_factory.mktemp("dense") / "model")


@pytest.mark.parametrize("ram", [None, 600_000])
def test_weights_beyond_the_budget_are_on_disk_and_speeds_are_of_the_same_tokens(dense: Path, ram: int | None) -> None:
    found = StockBenchmark(dense, PROMPT, 3, ram, 0).run()
    assert found.failed is None and found.placed is not None
    assert found.prefill_tokens_per_s and found.tokens_per_s and found.ms_per_token_p50 and found.load_seconds
    assert found.placed["vram"] == 0 and (found.placed["disk"] > 0) == (ram is not None)
    weights = sum(file.stat().st_size for file in dense.glob("*.safetensors"))
    assert sum(found.placed.values()) == pytest.approx(weights, rel=0.1)
    assert found.peak_rss_bytes > 2**27, "a process with torch in it"


def test_it_is_ended_when_its_time_is_over(dense: Path) -> None:
    found = StockBenchmark(dense, PROMPT, 3, None, 0, seconds=0.3).run()
    assert found.failed == "ended after 0 s" and found.tokens_per_s is None


def test_what_it_says_as_it_fails_is_one_line(dense: Path, tmp_path: Path) -> None:
    for file in dense.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    found = StockBenchmark(tmp_path, [300], 1, None, 0).run()  # the vocabulary has 256
    assert weights.exists() and found.failed is not None
    assert found.failed.startswith("it fails: ") and "\n" not in found.failed
    assert found.load_seconds is not None, "what was measured until then stands"


def test_a_directory_that_transformers_would_fill_with_random_weights_is_not_run(tmp_path: Path) -> None:
    make_family("gpt_oss", tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "model", experts=Scheme("int4", 32))
    found = StockBenchmark(tmp_path / "model", PROMPT, 3).run()
    assert found.failed is not None and "has no place for them" in found.failed and found.peak_rss_bytes == 0
