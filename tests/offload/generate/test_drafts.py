"""Drafts change how fast a text comes and nothing else: the same tokens, the same caches, the same chances."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from offload.experts.cache.tiered_cache import TieredCache
from offload.generate.answer import Answer
from offload.generate.batch import Batch
from offload.generate.generator import Generator
from offload.generate.grammar import json_grammar
from offload.records import RunOptions, Sampling, TokenRecord
from offload.run.session import Session
from tests import sessions
from tests.checkpoints import FAMILIES
from tests.drafting import Recorded, Repeated, draft_by

SPLITS: dict[Any, dict[str, Any]] = {"bf16": {"ram_slots": 64}, "int8": {"ram_slots": 5, "fills": False}}
PROMPTS = [[*range(5, 25)], [9, 8, 7, 6, 9, 8, 7, 6], [(i * 37 + 11) % 90 + 3 for i in range(50)]]
COUNT = 45  # past a page and, where a family attends in chunks, past several of these
GREEDY = Sampling(max_tokens=COUNT, ignore_eos=True)


@pytest.fixture
def session(models: Callable[[str], Path]) -> Iterator[Session]:
    with sessions.session(models("llama4"), RunOptions(context=400), ram_slots=64) as opened:
        opened.finish_filling()
        yield opened


def tokens_of(records: list[TokenRecord]) -> list[int]:
    return [record.token_id for record in records]


def alone(session: Session, prompt: list[int], sampling: Sampling = GREEDY) -> list[int]:
    """What follows ``prompt`` without drafts."""
    session.reset()
    return tokens_of(list(session.generate(prompt, sampling, drafts=False)))


def accepted(records: list[TokenRecord]) -> int:
    return sum(record.place > 0 for record in records)


@pytest.mark.parametrize("kv", SPLITS, ids=["in ram", "on disk"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_the_same_with_drafts_alone_and_in_company(
    family: str, kv: Any, models: Callable[[str], Path]
) -> None:
    with sessions.session(models(family), RunOptions(context=600, kv=kv), **SPLITS[kv]) as session:
        if session.plan.fills:
            session.finish_filling()
        texts = [alone(session, prompt) for prompt in PROMPTS]
        for prompt, text in zip(PROMPTS, texts, strict=True):
            session.reset()
            draft_by(session, partial(Recorded, [*prompt, *text], 0.3, seed=1), seed=len(prompt))
            records = list(session.generate(prompt, GREEDY))
            assert tokens_of(records) == text
            drafted = sum(record.drafted for record in records)
            assert 0 < accepted(records) < drafted, "some were right and some were wrong"
        session.reset()
        draft_by(session, Repeated)
        streams = [session.submit(prompt, GREEDY) for prompt in PROMPTS]
        assert [tokens_of(list(stream)) for stream in streams] == texts


@pytest.mark.parametrize("family", FAMILIES)
def test_rejected_tokens_leave_no_trace(family: str, models: Callable[[str], Path]) -> None:
    """What is kept afterwards is what is kept without drafts, and as much of it."""
    prompt = PROMPTS[2]
    with sessions.session(models(family), RunOptions(context=600), ram_slots=64) as session:
        session.finish_filling()
        batch = session.runner
        assert isinstance(batch, Batch)
        text = alone(session, prompt)
        kept, pages = _kept(batch), session.kv_pool.counts.free
        for seed in range(4):
            session.reset()
            draft_by(session, partial(Recorded, [*prompt, *text], 0.5, seed=seed), seed=seed)
            assert tokens_of(list(session.generate(prompt, GREEDY))) == text
            assert all(torch.equal(one, other) for one, other in zip(_kept(batch), kept, strict=True))
            assert session.kv_pool.counts.free == pages, "a page was kept for what was rejected"


def _kept(batch: Batch) -> list[torch.Tensor]:
    """Keys and values of the sequence that ran last, layer by layer."""
    cache = batch.prefixes._prefixes[-1].kept
    return [part for layer in cache.paged for part in layer._read(layer.start, layer.seen, torch.float32)]


def test_sampled_text_is_the_same_with_drafts(session: Session) -> None:
    """With everything that changes what is chosen."""
    settings: list[dict[str, Any]] = [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
        {"temperature": 1.0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"logit_bias": {7: 4.0, 8: -100.0}, "repetition_penalty": 1.1},
    ]
    for seed, asked in enumerate(settings):
        sampling = Sampling(max_tokens=40, ignore_eos=True, seed=seed, logprobs=2, **asked)
        session.reset()
        plain = list(session.generate(PROMPTS[0], sampling, drafts=False))
        session.reset()
        draft_by(session, partial(Recorded, [*PROMPTS[0], *tokens_of(plain)], 0.3, seed=seed))
        drafted = list(session.generate(PROMPTS[0], sampling))
        assert tokens_of(drafted) == tokens_of(plain)
        assert [record.logprobs for record in drafted] == [record.logprobs for record in plain]
        assert accepted(drafted) > 5


def test_a_grammar_is_kept_to_with_drafts_as_without(session: Session) -> None:
    """Its place in the text is moved by what is chosen alone, whatever was tried and rejected."""
    grammar = json_grammar({"type": "array", "items": {"type": "integer"}, "minItems": 9, "maxItems": 12})
    for seed in range(4):
        sampling = Sampling(max_tokens=60, seed=seed, temperature=1.0, grammar=grammar, logprobs=1)
        session.reset()
        plain = list(session.generate(PROMPTS[0], sampling, drafts=False))
        session.reset()
        draft_by(session, partial(Recorded, [*PROMPTS[0], *tokens_of(plain)], 0.2, seed=seed), seed)
        drafted = list(session.generate(PROMPTS[0], sampling))
        assert tokens_of(drafted) == tokens_of(plain)
        assert [record.finish for record in drafted] == [record.finish for record in plain]
        assert accepted(drafted) > 5
        if plain[-1].finish == "eos":
            assert 9 <= len(json.loads("".join(record.text for record in drafted))) <= 12


def test_a_drafted_token_is_chosen_as_often_as_it_is_probable(session: Session) -> None:
    """Two tokens in a row, whose chances depend on one another; the draft is the same each time, as n-grams are."""
    torch.manual_seed(0)
    first, after = torch.randn(4), torch.randn(4, 4)
    chances = torch.softmax(first, -1)[:, None] * torch.softmax(after, -1)
    runner, count = session.runner, 2000
    draft, seen = [2], Counter[tuple[int, int]]()
    for trial in range(count):
        answer = Answer([1], Sampling(max_tokens=2, temperature=1.0, seed=trial, ignore_eos=True), runner, 10)
        # The row after the draft is only believed where the draft was chosen; else the next step asks again.
        chosen = answer.choose([first, after[draft[0]]], draft)
        if len(chosen) == 1:
            chosen += answer.choose([after[chosen[0].token]], [])
        seen[chosen[0].token, chosen[1].token] += 1
    for pair, found in seen.items():
        expected = count * float(chances[pair])
        assert abs(found - expected) < 5 * math.sqrt(expected) + 3, pair
    assert len(seen) > 12


def test_a_text_ends_where_it_ends_without_drafts(session: Session) -> None:
    """At a stop string, an end-of-text token and a limit in the midst of what was drafted."""
    for limits in ({"max_tokens": 11}, {"max_tokens": 30, "stop": ("",)}):
        sampling = Sampling(ignore_eos=True, **limits)  # type: ignore[arg-type]
        text = alone(session, PROMPTS[1], Sampling(max_tokens=60, ignore_eos=True))
        plain = list(session.generate(PROMPTS[1], sampling, drafts=False))
        draft_by(session, partial(Recorded, [*PROMPTS[1], *text], 0.0, seed=0), seed=3)
        session.reset()
        records = list(session.generate(PROMPTS[1], sampling))
        assert tokens_of(records) == tokens_of(plain)
        assert [record.finish for record in records] == [record.finish for record in plain]
    whole = "".join(record.text for record in session.generate(PROMPTS[1], GREEDY, drafts=False))
    stop = whole[len(whole) // 2 :][:3]
    ends = []
    for drafts in (False, True):
        session.reset()
        records = list(session.generate(PROMPTS[1], GREEDY, stop=stop, drafts=drafts))
        ends.append(("".join(record.text for record in records), records[-1].finish, records[-1].stop))
        assert session.cached_tokens <= len(PROMPTS[1]) + len(records)
    assert ends[0] == ends[1] and ends[0][1] == "stop"


def test_eos_in_a_draft_ends_the_text(session: Session) -> None:
    text = alone(session, PROMPTS[0])
    session.runner.eos = frozenset({text[25]})
    plain = alone(session, PROMPTS[0], Sampling(max_tokens=COUNT))
    draft_by(session, partial(Recorded, [*PROMPTS[0], *text], 0.0, seed=0), seed=1)
    session.reset()
    records = list(session.generate(PROMPTS[0], max_tokens=COUNT))
    assert tokens_of(records) == plain and records[-1].finish == "eos"


def test_a_full_context_takes_no_drafts_beyond_it(models: Callable[[str], Path]) -> None:
    with sessions.session(models("qwen3_moe"), RunOptions(context=64), ram_slots=64) as session:
        text = alone(session, PROMPTS[2], Sampling(max_tokens=100, ignore_eos=True))
        assert len(text) == 64 - len(PROMPTS[2])
        draft_by(session, partial(Recorded, [*PROMPTS[2], *text, *range(40)], 0.0, seed=0))
        session.reset()
        records = list(session.generate(PROMPTS[2], max_tokens=100, ignore_eos=True))
        assert tokens_of(records) == text and records[-1].finish == "context"


def test_records_of_a_step_share_it(session: Session) -> None:
    text = alone(session, PROMPTS[0])
    draft_by(session, partial(Recorded, [*PROMPTS[0], *text], 0.2, seed=0))
    session.reset()
    records = list(session.generate(PROMPTS[0], GREEDY))
    steps: list[list[TokenRecord]] = []
    for record in records:
        if record.place == 0:
            steps.append([])
        steps[-1].append(record)
        assert record.place == len(steps[-1]) - 1 and (record.place == 0 or record.drafted == 0)
    dense = session.runner.parts.dense_bytes
    for step in steps[1:]:
        assert len(step) <= 1 + step[0].drafted
        assert sum(record.bytes_read["ram"] for record in step) > dense
        assert sum(record.bytes_read["ram"] for record in step[1:]) < dense * len(step)


@pytest.mark.parametrize("graph", [True, False])
def test_one_sequence_beside_a_gpu_drafts_too(graph: bool, models: Callable[[str], Path]) -> None:
    """The double of a GPU: what several tokens take there is a prompt's path, and the text is the same."""
    options = RunOptions(context=400, exact=True, graph=graph)
    placed = {"ram_slots": 8, "vram_slots": 6}
    with sessions.session(models("qwen3_moe"), options, **placed) as session:
        assert isinstance(session.experts, TieredCache)
        text = alone(session, PROMPTS[0])
        draft_by(session, partial(Recorded, [*PROMPTS[0], *text], 0.3, seed=0))
        session.reset()
        records = list(session.generate(PROMPTS[0], GREEDY))
        assert tokens_of(records) == text and accepted(records) > 5
        assert isinstance(session.runner, Generator) is graph
