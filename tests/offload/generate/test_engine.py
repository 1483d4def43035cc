"""Prompts from any thread: each has its own stream, and nobody's end or error is anybody else's."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from offload.decode.cpu import NativeDecoder
from offload.records import RunOptions, Sampling
from offload.run.session import Session
from quant.convert.convert import convert
from quant.errors import BudgetError, CheckpointError, UsageError
from quant.scheme import Scheme
from tests import sessions

PROMPTS = [list(range(5, 20)), list(range(30, 70)), [9, 8, 7, 6], list(range(100, 127))]
GREEDY = Sampling(max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "model"
    convert(tiny("llama4_text"), path, {"experts": Scheme("int4", group_size=32)})
    return path


@pytest.fixture
def session(model: Path) -> Iterator[Session]:
    with sessions.session(model, RunOptions(context=400), ram_slots=64) as opened:
        opened.finish_filling()
        yield opened


@pytest.fixture(scope="module")
def alone(model: Path) -> list[list[int]]:
    """What each prompt is followed by where nobody else asks."""
    found = []
    for prompt in PROMPTS:
        with sessions.session(model, RunOptions(context=400), ram_slots=64) as opened:
            found.append([record.token_id for record in opened.generate(prompt, GREEDY)])
    return found


def tokens(stream: Any) -> list[int]:
    return [record.token_id for record in stream]


def test_prompts_of_many_threads_get_the_text_that_each_gets_alone(session: Session, alone: list[list[int]]) -> None:
    found: dict[int, list[int]] = {}

    def ask(index: int) -> None:
        found[index] = tokens(session.submit(PROMPTS[index], GREEDY))

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[index] for index in range(len(PROMPTS))] == alone


def test_a_stream_says_what_was_asked_and_what_was_there(session: Session) -> None:
    first = session.submit(PROMPTS[0], GREEDY)
    answer = tokens(first)
    second = session.submit([*PROMPTS[0], *answer, 3], GREEDY)
    tokens(second)
    assert (first.prompt_tokens, first.cached_tokens) == (len(PROMPTS[0]), 0)
    assert (second.prompt_tokens, second.cached_tokens) == (len(PROMPTS[0]) + 13, len(PROMPTS[0]) + 11)


def test_a_cancelled_sequence_ends_and_the_next_one_runs(session: Session, alone: list[list[int]]) -> None:
    first = session.submit(PROMPTS[0], Sampling(max_tokens=300, ignore_eos=True))
    waiting = session.submit(PROMPTS[1], GREEDY)
    second = session.submit(PROMPTS[2], GREEDY)
    assert next(first).token_id == alone[0][0]
    first.cancel()
    waiting.cancel()
    assert tokens(first) == tokens(waiting) == []
    assert tokens(second) == alone[2]


def test_a_cancelled_prompt_is_broken_off_between_two_layers(session: Session, alone: list[list[int]]) -> None:
    decoder = session.decoder
    assert isinstance(decoder, NativeDecoder)
    stock, at_work, went_on, later = decoder.mlps[1], threading.Event(), threading.Event(), []
    decoder.mlps[1] = lambda x: (at_work.set(), went_on.wait(60), stock(x))[2]
    decoder.mlps[3], last = (lambda x: (later.append(1), last(x))[1]), decoder.mlps[3]
    stream = session.submit(PROMPTS[1], GREEDY)
    at_work.wait(60)
    stream.cancel()
    went_on.set()
    assert session.cached_tokens == 0 and not later
    decoder.mlps[1], decoder.mlps[3] = stock, last
    assert tokens(session.submit(PROMPTS[1], GREEDY)) == alone[1]


def test_an_error_is_raised_from_its_own_stream_only(session: Session, alone: list[list[int]]) -> None:
    decoder = session.decoder
    assert isinstance(decoder, NativeDecoder)
    stock = decoder.mlps[2]

    def fail(x: Any) -> Any:
        if len(x) == len(PROMPTS[1]):
            raise CheckpointError("it is gone")
        return stock(x)

    decoder.mlps[2] = fail
    streams = [session.submit(prompt, GREEDY) for prompt in PROMPTS[:3]]
    assert tokens(streams[0]) == alone[0]
    with pytest.raises(CheckpointError, match="it is gone"):
        tokens(streams[1])
    assert tokens(streams[1]) == []
    assert tokens(streams[2]) == alone[2]
    decoder.mlps[2] = stock


def test_prompts_that_can_never_run_are_refused_at_once(session: Session) -> None:
    with pytest.raises(UsageError, match="the prompt is empty"):
        session.submit([])
    with pytest.raises(BudgetError, match="the prompt has 400 tokens"):
        session.submit([5] * 400)


def test_closing_the_session_ends_every_stream(model: Path) -> None:
    with sessions.session(model, RunOptions(context=400), ram_slots=64) as opened:
        streams = [opened.submit(prompt, Sampling(max_tokens=300, ignore_eos=True)) for prompt in PROMPTS]
        next(streams[0])
        began = time.perf_counter()
    for stream in streams:
        list(stream)
    assert time.perf_counter() - began < 30
