"""A token's step begins before the record of the token before is given out, and nothing else changes: texts,
counts, errors, and what is left when nobody comes back for it."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from offload.decode.gpu import GraphDecoder
from offload.generate.sampling import Sampler
from offload.records import RunOptions, Sampling
from offload.run.session import Session
from quant.convert.convert import convert
from quant.errors import CheckpointError, UsageError
from quant.model.families import Role
from quant.scheme import Scheme
from tests import sessions

SCHEMES: dict[Role, Scheme] = {"experts": Scheme("int4", 32), "shared_expert": Scheme("int4")}
PROMPT = list(range(5, 60))
TOKENS = 8
OPTIONS = RunOptions(context=70, exact=True)
GREEDY = Sampling(max_tokens=TOKENS, ignore_eos=True)
SAMPLED = Sampling(max_tokens=TOKENS, ignore_eos=True, temperature=0.9, top_p=0.9, seed=7)


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    destination = tmp_path_factory.mktemp("flight") / "model"
    convert(tiny("llama4_text"), destination, SCHEMES)
    return destination


@pytest.fixture(scope="module")
def opened(model: Path) -> Iterator[Session]:
    with sessions.session(model, OPTIONS, ram_slots=6, vram_slots=8, fills=False) as s:
        list(s.runner.generate(PROMPT[:4], Sampling(max_tokens=2)))  # the first token is followed by what was put off
        yield s


@pytest.fixture
def session(opened: Session) -> Session:
    opened.reset()
    opened.experts.take_counters()
    return opened


def decoder_of(session: Session) -> GraphDecoder:
    assert isinstance(session.decoder, GraphDecoder)
    return session.decoder


def one_by_one(session: Session, sampling: Sampling) -> list[int]:
    """The tokens when every step is awaited before anything else is done."""
    sampler, context, decoder = Sampler(sampling), list(PROMPT), decoder_of(session)
    session.reset()
    with torch.inference_mode():
        logits = decoder.forward(PROMPT, session.runner.cache)[-1]
        while len(context) < len(PROMPT) + sampling.max_tokens:
            context.append(sampler.pick(logits, context))
            if len(context) < len(PROMPT) + sampling.max_tokens:
                logits = decoder.forward(context[-1:], session.runner.cache)[-1]
        decoder.flush()
    session.reset()
    session.experts.take_counters()
    return context[len(PROMPT) :]


@pytest.fixture(scope="module")
def expected(opened: Session) -> list[int]:
    return one_by_one(opened, GREEDY)


def at_rest(session: Session, kept: int) -> None:
    """No step is under way, and the KV cache holds the tokens it should."""
    decoder = decoder_of(session)
    assert decoder._launched is None and not decoder.flight._flying
    assert decoder.flight._serving is None or decoder.flight._serving.done()
    assert all(layer.seen == kept for layer in session.runner.cache.kept)
    assert session.cached_tokens == kept


def under_way(session: Session) -> bool:
    return decoder_of(session)._launched is not None


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_tokens_are_those_of_steps_that_are_awaited_one_by_one(session: Session, sampling: Sampling) -> None:
    alone = one_by_one(session, sampling)
    tokens, begun = [], []
    for record in session.runner.generate(PROMPT, sampling):
        tokens.append(record.token_id)
        begun.append(under_way(session))
    assert tokens == alone
    assert begun == [True] * (TOKENS - 1) + [False]
    at_rest(session, len(PROMPT) + TOKENS - 1)


def test_every_token_is_counted_once_by_its_own_record(session: Session) -> None:
    before, layers = session.routing.tokens, len(session.shape.moe_layers)
    records = list(session.runner.generate(PROMPT, GREEDY))
    assert [record.hits + record.misses for record in records[1:]] == [layers] * (TOKENS - 1)
    assert session.routing.tokens == before + len(PROMPT) + TOKENS - 1


@pytest.mark.parametrize("how", ["eos", "stop", "length", "context", "closed", "left"])
def test_however_a_text_ends_no_step_is_left_and_the_next_turn_goes_on_from_it(
    session: Session, expected: list[int], how: str
) -> None:
    sampling, many = GREEDY, TOKENS
    generator = session.runner
    if how == "eos":
        at = next(i for i in range(2, TOKENS) if expected[i] not in expected[:i])
        generator.eos, many = frozenset([expected[at]]), at + 1
        sampling = Sampling(max_tokens=TOKENS)
    elif how == "stop":
        text = session.tokenizer.decode(expected)
        assert len(text) > 3
        sampling, many = Sampling(max_tokens=TOKENS, ignore_eos=True, stop=(text[2:4],)), -1
    elif how == "context":
        sampling, many = Sampling(max_tokens=1000, ignore_eos=True), 70 - len(PROMPT)
    try:
        if how in ("closed", "left"):
            running = session.runner.generate(PROMPT, sampling)
            taken, many = [next(running), next(running), next(running)], 3
            assert under_way(session)
            if how == "closed":
                running.close()  # type: ignore[attr-defined]
        else:
            taken = list(session.runner.generate(PROMPT, sampling))
            assert taken[-1].finish == how
    finally:
        generator.eos = frozenset()
    many = len(taken) if many < 0 else many
    assert len(taken) == many and [r.token_id for r in taken][:TOKENS] == expected[:many]
    if how != "left":
        at_rest(session, len(PROMPT) + many - 1)
    again = [*PROMPT, *expected[:2]]
    turn = list(session.runner.generate(again, Sampling(max_tokens=3, ignore_eos=True)))
    assert [record.token_id for record in turn] == expected[2:5]
    at_rest(session, len(again) + 2)
    if how == "left":
        with pytest.raises(UsageError, match="another generation has begun"):
            next(running)


@pytest.mark.parametrize("what", ["the disk", "the step", "its beginning"])
def test_an_error_is_raised_once_where_its_own_token_is_asked_for(
    session: Session, expected: list[int], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder: Any = decoder_of(session)
    calls = 0
    broken = {
        "the disk": (decoder.worker, "fetch"),
        "the step": (decoder.step, "_lm_head"),
        "its beginning": (session.experts, "begin_token"),
    }[what]
    work = getattr(*broken)

    def fail(*args: Any) -> Any:
        nonlocal calls
        if decoder.kv.get_seq_length() == len(PROMPT) + 2:
            calls += 1
            raise CheckpointError("it is gone")
        return work(*args)

    monkeypatch.setattr(*broken, fail)
    running = session.runner.generate(PROMPT, GREEDY)
    seen = [next(running).token_id for _ in range(3)]
    with pytest.raises(CheckpointError, match="it is gone"):
        next(running)
    monkeypatch.undo()
    assert calls == 1 and seen == expected[:3], "records of the tokens before are not lost"
    at_rest(session, len(PROMPT) + 2)
    turn = session.runner.generate([*PROMPT, *expected[:3]], Sampling(max_tokens=3, ignore_eos=True))
    assert [record.token_id for record in turn] == expected[3:6]


def test_without_memory_a_step_that_was_under_way_is_tried_again_with_fewer_slots(
    model: Path, expected: list[int]
) -> None:
    with sessions.session(model, OPTIONS, ram_slots=6, vram_slots=16, fills=False) as s:
        list(s.runner.generate(PROMPT[:4], Sampling(max_tokens=2)))
        s.reset()
        decoder: Any = s.decoder
        head, failed = decoder.step._lm_head, []

        def fail(h: torch.Tensor) -> Any:
            if len(failed) < 2 and decoder.kv.get_seq_length() == len(PROMPT) + 2:
                failed.append(s.experts.vram.slots.count)  # type: ignore[attr-defined]
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
            return head(h)

        decoder.step._lm_head = fail
        assert [record.token_id for record in s.runner.generate(PROMPT, GREEDY)] == expected
        assert failed == [16, 14]


def test_a_slow_caller_neither_keeps_a_step_waiting_nor_is_counted_as_its_time(
    session: Session, expected: list[int]
) -> None:
    decoder, tokens, seconds = decoder_of(session), [], []
    slept = 0.0
    for index, record in enumerate(session.runner.generate(PROMPT, GREEDY)):
        tokens.append(record.token_id)
        seconds.append(record.seconds)
        if index == 3:
            began, running = time.perf_counter(), decoder.thread._running
            assert running is not None
            while not running.done():  # it reads from disk meanwhile, with nobody here
                time.sleep(0.01)
                assert time.perf_counter() - began < 60, "the step does not end by itself"
            time.sleep(1.0)
            slept = time.perf_counter() - began
            at_work = decoder.flight._serving
            assert at_work is not None and at_work.done(), "a core goes on spinning"
    assert tokens == expected
    assert seconds[4] <= slept - 1.0 + 0.5, "the caller's sleep is in the step's time"


def test_where_experts_are_can_be_asked_between_records(session: Session, expected: list[int]) -> None:
    tokens = []
    for record in session.runner.generate(PROMPT, GREEDY):
        tokens.append(record.token_id)
        assert len(session.expert_tiers()) == session.store.count
    assert tokens == expected


def test_ctrl_c_while_a_step_is_begun_ends_it(
    session: Session, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder: Any = decoder_of(session)

    def interrupt(embedding: torch.Tensor) -> None:
        raise KeyboardInterrupt

    running = session.runner.generate(PROMPT, GREEDY)
    next(running)
    monkeypatch.setattr(decoder.worker, "look_ahead", interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(running)
    monkeypatch.undo()
    at_rest(session, len(PROMPT) + 1)
    # The next step follows at once, without a prompt between that would put the cache in order.
    turn = session.runner.generate([*PROMPT, *expected[:2]], Sampling(max_tokens=2, ignore_eos=True))
    assert [record.token_id for record in turn] == expected[2:4]


def test_sequences_take_turns_and_it_is_said(session: Session, expected: list[int]) -> None:
    streams = [session.submit(PROMPT, GREEDY) for _ in range(3)]
    assert [[record.token_id for record in stream] for stream in streams] == [expected] * 3
    assert sum("took turns" in note for note in session.notes) == 1
