"""Any sequences at any times: nothing leaks, and each gets the text that it gets alone.

``COLDSTREAM_STEPS`` sets how many steps of random schedules are run per family: 60 by default. Half of the texts are
drafted for by their own words, half by a draft model that has pages for two of them only.
"""

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from offload.generate.batch import Batch
from offload.generate.model_drafts import DraftModel
from offload.generate.stream import Stream
from offload.model.paged_cache import PagedCache
from offload.records import RunOptions, Sampling, TokenRecord
from offload.run.session import Session
from quant.errors import CheckpointError
from tests import sessions
from tests.checkpoints import FAMILIES
from tests.drafting import Repeated, draft_by

STEPS = int(os.environ.get("COLDSTREAM_STEPS", "60"))
SPLITS: dict[str, dict[str, Any]] = {"in ram": {"ram_slots": 64}, "on disk": {"ram_slots": 5, "fills": False}}
CONTEXT = 384
# Without a table: one of each kind of attention and of routing.
SCHEDULED = ("gpt_oss", "glm4_moe", "deepseek_v3", "llama", "mistral")
# A base and what may follow it, so that prompts begin alike.
BASES = [list(range(5, 25)), [9, 8, 7, 6], [*range(40, 90), *range(30, 110)]]


@pytest.fixture
def session(models: Callable[[str], Path]) -> Iterator[Session]:
    with sessions.session(models("qwen3_moe"), RunOptions(context=CONTEXT), ram_slots=64) as opened:
        opened.finish_filling()
        yield opened


def batch_of(session: Session) -> Batch:
    assert isinstance(session.runner, Batch)
    return session.runner


@dataclass
class Asked:
    """A prompt, and what has come of it."""

    prompt: list[int]
    count: int
    stream: Stream
    found: list[int] = field(default_factory=list)
    failed: bool = False

    def take(self) -> None:
        """Note what the stream has by now, without waiting for more."""
        while not self.stream._events.empty():
            event = self.stream._events.get()
            self.failed |= isinstance(event, CheckpointError)
            if isinstance(event, TokenRecord):
                self.found.append(event.token_id)


class Texts:
    """What follows a prompt where nobody else is there, token after token; computed when it is asked for."""

    def __init__(self, session: Session) -> None:
        self._session, self._known = session, dict[tuple[int, ...], list[int]]()

    def after(self, prompt: list[int], count: int) -> list[int]:
        known = self._known.setdefault(tuple(prompt), [])
        if len(known) < count:
            self._session.reset()
            greedy = Sampling(max_tokens=count, ignore_eos=True)
            known[:] = [record.token_id for record in self._session.generate(prompt, greedy)]
        return known[:count]


def pages_in_use(session: Session) -> int:
    counts = session.kv_pool.counts
    return counts.count - counts.free


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("family", [*FAMILIES, *SCHEDULED, "flex_olmo"])  # the last by transformers' modules
def test_random_schedules_leak_nothing_and_change_no_text(
    family: str, split: str, models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(f"{family} {split}")
    options = RunOptions(context=CONTEXT, exact=True)
    with (
        sessions.session(models(family), options, **SPLITS[split]) as session,
        sessions.session(models(family), options, **SPLITS[split]) as other,
        sessions.session(models("mixtral"), RunOptions(context=CONTEXT // 2, sequences=2), ram_slots=64) as draft,
    ):
        texts, batch, pool = Texts(other), batch_of(session), draft.kv_pool
        model = DraftModel(
            draft.decoder,
            draft.experts,
            partial(PagedCache, pool),
            tokens=256,
            context=CONTEXT // 2,
            chunk=32,
            notes=[],
        )
        draft_by(session, lambda: Repeated() if chance.random() < 0.5 else model.begin())
        draft.finish_filling()
        if session.plan.fills:
            session.finish_filling()
            other.finish_filling()
        asked: list[Asked] = []
        failing: set[int] = set()
        forward = session.decoder.forward_rows

        def fail(rows: Any) -> Any:
            if failing & {id(cache) for _, cache in rows}:
                raise CheckpointError("it is gone")
            return forward(rows)

        monkeypatch.setattr(session.decoder, "forward_rows", fail)
        files = len(os.listdir("/proc/self/fd"))
        for _ in range(STEPS):
            act = chance.random()
            running = [entry for entry in asked if not entry.stream.ended and not entry.stream.cancelled]
            if act < 0.15 and len(running) < 6:
                prompt = list(chance.choice(BASES)) + [chance.randrange(3, 100) for _ in range(chance.randrange(4))]
                if asked and chance.random() < 0.3:  # go on from what came of another, or from the middle of it
                    before = chance.choice(asked)
                    prompt = [*before.prompt, *before.found][: CONTEXT - 40]
                    kept = chance.randrange(len(prompt) // 2, len(prompt)) + 1
                    prompt = [*prompt[:kept], chance.randrange(3, 9)]
                count = chance.randrange(1, 30)
                stream = Stream(len(prompt), lambda cancelled: None)
                batch.add(prompt, Sampling(max_tokens=count, ignore_eos=True), stream)
                asked.append(Asked(prompt, count, stream))
            elif act < 0.18 and running:
                chance.choice(running).stream.cancel()
            elif act < 0.2 and batch.scheduler.decoding:
                failing = {id(chance.choice(batch.scheduler.decoding).cache)}
            batch.step()
            failing = set()
            for entry in asked:
                entry.take()
        for entry in asked[::3]:
            entry.stream.cancel()
        while batch.step():
            pass
        checked = 0
        for entry in asked:
            entry.take()
            assert entry.failed or entry.stream.cancelled or len(entry.found) == entry.count
            assert entry.found == texts.after(entry.prompt, entry.count)[: len(entry.found)]
            checked += len(entry.found)
        assert checked > STEPS // 2
        assert len(os.listdir("/proc/self/fd")) <= files, "a file was left open"
        assert not batch.scheduler.running and not batch.scheduler.waiting
        session.reset()
        assert pages_in_use(session) == 0, "pages were not given back"
        assert pool.counts.free == pool.counts.count, "the draft model's pages were not given back"
        busy = [key for key in session.store.experts() if session.experts.reading(key)]
        session.experts.wait()
        assert not busy or split == "on disk"


def test_prompts_that_begin_alike_are_computed_once(session: Session) -> None:
    prompt = BASES[2]
    first = session.submit(prompt, max_tokens=3, ignore_eos=True)
    answer = [record.token_id for record in first]
    pages = pages_in_use(session)
    second = session.submit([*prompt, *answer, 5, 6], max_tokens=3, ignore_eos=True)
    list(second)
    third = session.submit([*prompt, 77, 78], max_tokens=3, ignore_eos=True)
    list(third)
    assert first.cached_tokens == 0
    assert second.cached_tokens == len(prompt) + 2
    assert third.cached_tokens == len(prompt)
    one_page_each = session.shape.num_layers
    assert pages_in_use(session) <= pages + one_page_each, "copied is only where the texts part"


def test_a_prompt_that_begins_like_one_that_is_still_going_on_is_not_computed_again(session: Session) -> None:
    first = session.submit(BASES[2], max_tokens=40, ignore_eos=True)
    next(first)
    second = session.submit([*BASES[2], 4], max_tokens=4, ignore_eos=True)
    found = [record.token_id for record in second]
    assert second.cached_tokens == len(BASES[2])
    first.cancel()
    session.reset()
    assert found == [record.token_id for record in session.generate([*BASES[2], 4], max_tokens=4, ignore_eos=True)]


def test_a_chunk_that_ended_in_an_answer_is_not_computed_again_for_the_next_prompt(
    models: Callable[[str], Path],
) -> None:
    """An answer that comes back in other words, as a call does that was parsed and rendered anew."""
    with sessions.session(models("llama4_text"), RunOptions(context=CONTEXT), ram_slots=64) as opened:
        opened.finish_filling()
        assert opened.shape.attention_chunk_size == 32
        for length in (27, 61, 95):  # 95: the border comes right with the first token
            prompt = [(7 * i + length) % 90 + 5 for i in range(length)]
            list(opened.submit(prompt, max_tokens=8, ignore_eos=True))
            again = [*prompt, 3, 4, 5]
            stream = opened.submit(again, max_tokens=4, ignore_eos=True)
            found = [record.token_id for record in stream]
            assert stream.cached_tokens == length
            opened.reset()
            assert pages_in_use(opened) == 0
            assert found == [record.token_id for record in opened.generate(again, max_tokens=4, ignore_eos=True)]
            opened.reset()


def test_where_no_page_is_free_the_end_of_a_chunk_takes_those_of_what_was_used_long_ago(
    models: Callable[[str], Path],
) -> None:
    with sessions.session(models("llama4_text"), RunOptions(context=CONTEXT), ram_slots=64) as opened:
        opened.finish_filling()
        counts, layers = opened.kv_pool.counts, opened.shape.num_layers
        for first in range(5, 95):  # each leaves pages behind
            if counts.free < layers:
                break
            list(opened.submit([first] * 40, max_tokens=1))
        assert counts.free < layers
        prompt = [(7 * i) % 90 + 5 for i in range(27)]
        list(opened.submit(prompt, max_tokens=8, ignore_eos=True))
        stream = opened.submit([*prompt, 3, 4, 5], max_tokens=1)
        list(stream)
        assert stream.cached_tokens == len(prompt)


def test_the_tokens_of_an_answer_that_was_cut_off_are_kept_for_the_prompt_that_goes_on(
    models: Callable[[str], Path],
) -> None:
    with sessions.session(models("mixtral"), RunOptions(context=CONTEXT), ram_slots=64) as opened:
        stream = opened.generate([8, 9], max_tokens=30, ignore_eos=True)
        said = [8, 9, *(next(stream).token_id for _ in range(3))]
        stream.close()
        opened.engine.call(lambda: None)  # it has looked since
        opened.engine.call(lambda: None)
        assert opened.runner.parts.own._texts[-1].tolist()[: len(said)] == said


@pytest.mark.parametrize("family", ["llama4", "qwen3_moe", *SCHEDULED])
def test_a_long_prompt_beside_others_is_run_in_short_chunks_to_the_same_bits(
    family: str, models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    long = [(7 * i) % 90 + 5 for i in range(300)]
    options = RunOptions(context=CONTEXT, sequences=2)
    with sessions.session(models(family), options, ram_slots=64) as session:
        session.finish_filling()
        lengths: list[int] = []
        forward = session.decoder.forward

        def noted(ids: Any, cache: Any, *, keep: int = 1) -> Any:
            lengths.append(len(ids))
            return forward(ids, cache, keep=keep)

        monkeypatch.setattr(session.decoder, "forward", noted)
        asked = Sampling(max_tokens=8, ignore_eos=True, logprobs=5)
        alone = list(session.generate(long, asked))
        session.reset()
        batch_of(session)._chunk.note(64, 1.0)
        monkeypatch.setattr(batch_of(session)._chunk, "note", lambda *took: None)
        first = session.submit(BASES[0], max_tokens=60, ignore_eos=True)
        next(first)
        beside = list(session.submit(long, asked))
        first.cancel()
    assert lengths[0] == 300 and lengths[2:4] == [64, 64], lengths
    assert [(r.token_id, r.logprobs) for r in beside] == [(r.token_id, r.logprobs) for r in alone]


def test_sequences_that_do_not_fit_wait_and_it_is_said(session: Session) -> None:
    long = [(7 * i) % 90 + 5 for i in range(200)]
    streams = [session.submit([seed, *long], max_tokens=8, ignore_eos=True) for seed in (3, 4)]
    found = [[record.token_id for record in stream] for stream in streams]
    assert any("waited for others" in note for note in session.notes)
    session.reset()
    alone = [[r.token_id for r in session.generate([seed, *long], max_tokens=8, ignore_eos=True)] for seed in (3, 4)]
    assert found == alone


def test_a_sequence_that_gives_way_to_an_older_one_goes_on_with_the_same_text(session: Session) -> None:
    """Two that fit as they begin, and no more once both have grown."""
    prompts = [[seed, *range(5, 125)] for seed in (3, 4)]
    streams = [session.submit(prompt, max_tokens=200, ignore_eos=True) for prompt in prompts]
    found = [[record.token_id for record in stream] for stream in streams]
    assert any("waited for others" in note for note in session.notes)
    session.reset()
    for prompt, text in zip(prompts, found, strict=True):
        session.reset()
        assert [r.token_id for r in session.generate(prompt, max_tokens=200, ignore_eos=True)] == text


def test_the_shares_of_a_step_add_up_to_what_was_read(session: Session) -> None:
    prompts = [BASES[0], BASES[1], BASES[2][:50]]
    streams = [Stream(len(prompt), lambda cancelled: None) for prompt in prompts]
    batch = batch_of(session)
    for prompt, stream in zip(prompts, streams, strict=True):
        batch.add(prompt, Sampling(max_tokens=12, ignore_eos=True), stream)
    while batch.step():
        pass
    records = [list(stream) for stream in streams]
    together = [record for run in records for record in run if record.sequences == 3]
    assert len(together) >= 3 * 8
    dense = session.runner.parts.dense_bytes
    per_step = sum(record.bytes_read["ram"] for record in together) / (len(together) / 3)
    assert dense < per_step < 2 * dense + session.experts.counters.used_bytes["ram"] + 10**6
    requests = sum(record.hits + record.misses for record in together) / (len(together) / 3)
    layers, top_k = len(session.shape.moe_layers), session.shape.top_k
    assert layers * top_k <= requests <= 3 * layers * top_k, "an expert that several chose counts once"


def test_a_cache_that_was_freed_holds_nothing(session: Session) -> None:
    list(session.generate(BASES[0], max_tokens=3, ignore_eos=True))
    cache: PagedCache = batch_of(session).prefixes.matching(BASES[0])[0][1].kept
    assert cache.page_count == session.shape.num_layers
    session.reset()
    assert cache.page_count == 0 and pages_in_use(session) == 0
