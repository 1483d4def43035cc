"""Past every border of a long text: chunks of attention, chunks of a prompt, pages, steps of the temperature."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from offload.records import RunOptions, Sampling
from offload.run.session import Session
from quant.convert.convert import convert
from quant.model.families import Role
from quant.scheme import Scheme
from tests import oracle, sessions

CHUNK = 256
TEXT = [(i * i * 7 + i * 31 + 5) % 256 for i in range(3 * CHUNK + 5)]
BORDERS = [at + near for at in (CHUNK, 2 * CHUNK, 3 * CHUNK) for near in (-1, 0, 1, 2)]
SCHEMES: dict[Role, Scheme] = {"experts": Scheme("int4", 32), "attention": Scheme("int8", 32)}
Models = Callable[..., Path]


@pytest.fixture(scope="module")
def models(tiny: Models, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    source = tiny("llama4_text", attention_chunk_size=CHUNK, floor_scale=100, max_position_embeddings=1024)
    convert(source, tmp_path_factory.mktemp("long") / "model", SCHEMES)
    return source, next(tmp_path_factory.getbasetemp().glob("long*/model"))


@pytest.fixture(scope="module")
def stock(models: tuple[Path, Path]) -> tuple[torch.Tensor, list[int]]:
    """Logits of every token of the text, and what follows it."""
    model: Any = oracle.stock(*models)
    with torch.inference_mode():
        ids = torch.tensor([TEXT])
        text = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
        return model(input_ids=ids).logits[0], text[0, len(TEXT) :].tolist()


def opened(models: tuple[Path, Path], **options: object) -> Session:
    asked = RunOptions(**{"context": 1000, "exact": True, **options})  # type: ignore[arg-type]
    return sessions.session(models[1], asked, ram_slots=64, prompt_chunk=90)


def test_three_chunks_and_what_follows_equal_stock_transformers(
    models: tuple[Path, Path], stock: tuple[torch.Tensor, list[int]]
) -> None:
    logits, follows = stock
    with opened(models) as session:
        said = [r.token_id for r in session.generate(TEXT, Sampling(max_tokens=12, ignore_eos=True))]
        assert said == follows
        for length in BORDERS:
            if length <= len(TEXT):
                found = sessions.prompt_logits(session, TEXT[:length])
                torch.testing.assert_close(found, logits[length - 1], atol=1e-4, rtol=0)


def test_a_text_that_is_taken_up_again_behind_a_border_goes_on_as_if_it_had_been_run_at_once(
    models: tuple[Path, Path], stock: tuple[torch.Tensor, list[int]]
) -> None:
    with opened(models) as session:
        sampling = Sampling(max_tokens=12, ignore_eos=True)
        for kept in (
            2 * CHUNK + 70,
            2 * CHUNK,
            2 * CHUNK - 30,
        ):  # behind the last border that was passed, at it, before
            list(session.generate([*TEXT[:kept], *reversed(TEXT[:180])], Sampling(max_tokens=3, ignore_eos=True)))
            assert [r.token_id for r in session.generate(TEXT, sampling)] == stock[1], kept


def test_an_int8_kv_cache_costs_no_more_behind_the_third_border_than_before_the_first(
    models: tuple[Path, Path], stock: tuple[torch.Tensor, list[int]]
) -> None:
    likely = stock[0].log_softmax(-1)
    with opened(models, exact=False, kv="int8") as session:
        worst = []
        for length in (CHUNK - 2, *BORDERS):
            if length <= len(TEXT):
                found = sessions.prompt_logits(session, TEXT[:length]).log_softmax(-1)
                expected = likely[length - 1]
                worst.append(float((expected.exp() * (expected - found)).sum()))
    assert max(worst) < 0.02
