"""A draft model changes how fast a text comes and nothing else, and takes what it was planned to take."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from offload.batch.draft_policy import DraftPolicy, StepTimes
from offload.generate.model_drafts import DraftModel, ModelDraft, ModelDrafts
from offload.model.paged_cache import PagedCache
from offload.plan.planned_run import planned_run
from offload.records import RunOptions, Sampling, TokenRecord
from offload.run.session import Session
from quant.errors import BudgetError, CheckpointError, UsageError
from tests import sessions
from tests.drafting import draft_by
from tests.machines import machine

PROMPTS = [[*range(5, 25)], [9, 8, 7, 6, 9, 8, 7, 6], [(i * 37 + 11) % 90 + 3 for i in range(50)]]
GREEDY = Sampling(max_tokens=45, ignore_eos=True)


def tokens_of(records: list[TokenRecord]) -> list[int]:
    return [record.token_id for record in records]


def plain(session: Session, prompt: list[int], sampling: Sampling = GREEDY) -> list[int]:
    session.reset()
    return tokens_of(list(session.generate(prompt, sampling, drafts=False)))


@contextmanager
def drafting(session: Session, draft: Path, *, context: int = 300, sequences: int = 3) -> Iterator[DraftModel]:
    """``session`` drafts with the model ``draft``, to any depth, whatever that costs."""
    with sessions.session(draft, RunOptions(context=context, sequences=sequences), ram_slots=64) as other:
        pool = other.kv_pool
        model = DraftModel(
            other.decoder,
            other.experts,
            partial(PagedCache, pool),
            tokens=256,
            context=context,
            chunk=32,
            notes=session.notes,
        )
        draft_by(session, model.begin)
        yield model
        assert pool.counts.free == pool.counts.count, "texts that are over leave no pages behind"


@pytest.mark.parametrize("family", ["llama4", "qwen3_moe", "olmoe"])
def test_greedy_text_is_the_same_with_a_draft_model_alone_and_in_company(
    family: str, models: Callable[[str], Path]
) -> None:
    """One that is always right, and one that hardly ever is."""
    with sessions.session(models(family), RunOptions(context=300, sequences=3), ram_slots=64) as session:
        session.finish_filling()
        texts = [plain(session, prompt) for prompt in PROMPTS]
        for draft in (family, "mixtral"):
            with drafting(session, models(draft)):
                for prompt, text in zip(PROMPTS, texts, strict=True):
                    session.reset()
                    records = list(session.generate(prompt, GREEDY))
                    assert tokens_of(records) == text
                    drafted, right = sum(r.drafted for r in records), sum(r.place > 0 for r in records)
                    assert drafted > 10 and (right > 0.7 * drafted if draft == family else right < drafted)
                session.reset()
                streams = [session.submit(prompt, GREEDY) for prompt in PROMPTS]
                assert [tokens_of(list(stream)) for stream in streams] == texts


def test_sampled_text_is_the_same_with_a_draft_model(models: Callable[[str], Path]) -> None:
    with sessions.session(models("llama4"), RunOptions(context=300), ram_slots=64) as session:
        for seed in range(3):
            sampling = Sampling(max_tokens=40, ignore_eos=True, temperature=0.8, top_p=0.9, seed=seed, logprobs=1)
            text = plain(session, PROMPTS[0], sampling)
            with drafting(session, models("llama4")):
                session.reset()
                assert tokens_of(list(session.generate(PROMPTS[0], sampling))) == text


def test_what_was_rejected_is_taken_back_and_nothing_is_run_twice(models: Callable[[str], Path]) -> None:
    with sessions.session(models("mixtral"), RunOptions(context=300), ram_slots=64) as other:
        run: list[list[int]] = []
        forward = other.decoder.forward_rows

        def counted(rows: object) -> object:
            run.extend(list(ids) for ids, _ in rows)  # type: ignore[attr-defined]
            return forward(rows)  # type: ignore[arg-type]

        other.decoder.forward_rows = counted  # type: ignore[method-assign, assignment]
        pool = other.kv_pool
        draft = DraftModel(
            other.decoder, other.experts, partial(PagedCache, pool), tokens=256, context=300, chunk=16, notes=[]
        ).begin()
        text = PROMPTS[1]
        draft.extend(text)
        first = draft.propose(3)
        assert len(first.tokens) == len(first.evidence) == 3 and set(first.evidence) <= {2, 3, 4, 6, 9, 17}
        assert [len(ids) for ids in run] == [8, 1, 1]
        wrong = (first.tokens[1] + 1) % 256
        draft.extend([*text, first.tokens[0], wrong])
        draft.propose(1)
        assert run[3:] == [[wrong]], "what was right is kept, what was wrong is run anew"
        assert isinstance(draft._cache, PagedCache) and draft._cache.get_seq_length() == 10
        fresh = DraftModel(
            other.decoder, other.experts, partial(PagedCache, pool), tokens=256, context=300, chunk=16, notes=[]
        )
        again = fresh.begin()
        again.extend([*text, first.tokens[0], wrong])
        draft.extend([*text, first.tokens[0], wrong])
        assert again.propose(4) == draft.propose(4), "as if it had been run from the beginning"
        draft.close()
        again.close()
        assert pool.counts.free == pool.counts.count


def test_a_draft_model_that_fails_leaves_the_text_as_it_is(models: Callable[[str], Path]) -> None:
    with sessions.session(models("mixtral"), RunOptions(context=300), ram_slots=64) as session:
        text = plain(session, PROMPTS[0])
        with drafting(session, models("mixtral")) as model:
            run, calls = model.run, [0]

            def failing(ids: list[int], cache: object) -> object:
                calls[0] += 1
                if calls[0] == 4:
                    raise CheckpointError("the disk is gone")
                return run(ids, cache)  # type: ignore[arg-type]

            model.run = failing  # type: ignore[method-assign, assignment]
            session.reset()
            assert tokens_of(list(session.generate(PROMPTS[0], GREEDY))) == text
            assert calls[0] == 4, "it is not asked again"
        assert "no drafts any more: the draft model failed (the disk is gone)" in session.notes


def test_texts_for_which_it_has_no_room_go_on_without_drafts(models: Callable[[str], Path]) -> None:
    with sessions.session(models("mixtral"), RunOptions(context=300, sequences=3), ram_slots=64) as session:
        texts = [plain(session, prompt) for prompt in PROMPTS]
        with drafting(session, models("mixtral"), context=60, sequences=1):
            session.reset()
            streams = [session.submit(prompt, GREEDY) for prompt in PROMPTS]
            assert [tokens_of(list(stream)) for stream in streams] == texts


def test_tokens_that_it_does_not_know_are_not_drafted_for(models: Callable[[str], Path]) -> None:
    with sessions.session(models("mixtral"), RunOptions(context=300), ram_slots=64) as other:
        model = DraftModel(
            other.decoder,
            other.experts,
            partial(PagedCache, other.kv_pool),
            tokens=100,
            context=300,
            chunk=16,
            notes=[],
        )
        draft = model.begin()
        draft.extend([5, 6, 100])
        assert draft.propose(3).tokens == []
        draft.extend([5, 6, 99])
        assert all(token < 100 for token in draft.propose(3).tokens)
        draft.close()


class Costly(DraftModel):
    """A draft model whose every token takes ``each`` seconds and is right or not."""

    def __init__(self, each: float) -> None:
        self.seconds, self.drafted, self.failed, self.each, self.asked = 0.0, 0, False, each, 0
        self.tokens, self.context = 1000, 10_000

    def begin(self) -> ModelDraft:
        return _CostlyDraft(self)


class _CostlyDraft(ModelDraft):
    def _draft(self, found: object, most: int) -> None:
        model = self._model
        assert isinstance(model, Costly)
        found.tokens.extend([1] * most)  # type: ignore[attr-defined]
        found.evidence.extend([9] * most)  # type: ignore[attr-defined]
        model.seconds += most * model.each
        model.asked += most


def spent(each: float, chance: int, steps: int = 1500) -> tuple[float, int, int]:
    """Seconds per token, of one second without drafts, if of ten drafted tokens ``chance`` are right; how many were
    drafted, and how many of these in the last third."""
    policy = DraftPolicy(StepTimes(lambda rows: rows, lambda tier: 10.0, 600))
    model = Costly(each)
    drafts = ModelDrafts(policy, model)
    text, tokens, seconds, count, late = drafts.begin(), [5], 0.0, 0, 0
    for step in range(steps):
        before = model.asked
        [tried] = drafts.choose([(text, tokens, 8)], 15)
        right = next((i for i in range(len(tried)) if (step + i) % 10 >= chance), len(tried))
        came = [1] * right + [0 if (step + right) % 10 >= chance else 1]
        text.learn(came)
        took = 1.0 + 0.3 * len(tried)
        drafts.note(1, len(tried), len(came), took, {"ram": 1000})
        tokens += came
        seconds += took + (model.asked - before) * each
        count += len(came)
        late += (model.asked - before) if step > steps * 2 // 3 else 0
    return seconds / count, model.asked, late


def test_a_cheap_draft_model_that_is_often_right_is_used() -> None:
    seconds, drafted, _ = spent(0.05, 9)
    assert drafted > 1500 and seconds < 0.7


@pytest.mark.parametrize(("each", "chance"), [(0.05, 1), (0.9, 9), (2.0, 10), (0.3, 4)])
def test_one_that_does_not_pay_is_given_up_and_has_cost_little(each: float, chance: int) -> None:
    seconds, drafted, late = spent(each, chance)
    assert seconds < 1.03, "drafts may lose a hundredth, and what finding that out takes"
    assert 0 < drafted < 100 and late <= 10, "it is tried again, ever more seldom"


def test_bytes_of_a_draft_model_are_in_the_plan_and_in_its_budget(tmp_path: Path, tiny: Callable[..., Path]) -> None:
    model, draft = str(tiny("llama4_text")), tiny("mixtral")
    own = machine()
    alone = planned_run(model, RunOptions(device="cpu", context=512), machine=own).plan
    run = planned_run(model, RunOptions(device="cpu", context=512, draft_model=draft), machine=own)
    assert run.draft is not None and run.draft.plan.ram_slots == run.draft.plan.experts
    size = run.plan.total("ram", "draft_model")
    assert size == run.draft.plan.total("ram") - run.draft.plan.framework_bytes > 0
    assert run.plan.total("ram") == alone.total("ram") + size, "there is room enough: nothing else changes"
    tight = alone.total("ram") - alone.framework_bytes
    planned_run(model, RunOptions(device="cpu", context=512, ram=tight), machine=own)
    beside = RunOptions(device="cpu", context=512, ram=tight + size, draft_model=draft)
    exact = planned_run(model, beside, machine=own).plan
    assert exact.ram == tight + size and exact.total("ram") - exact.framework_bytes <= exact.ram
    with pytest.raises(BudgetError, match=r"beside a draft model of .*MiB"):
        planned_run(model, RunOptions(device="cpu", context=512, ram=size, draft_model=draft), machine=own)


def test_a_draft_model_with_another_tokenizer_is_refused_by_name(tmp_path: Path, tiny: Callable[..., Path]) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny("mixtral"), other)
    said = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(said.replace('"a":', '"\u0101":'))
    with pytest.raises(UsageError, match=r"the draft model .*other has another tokenizer \(\d+ tokens, this model's"):
        Session.open(tiny("mixtral"), device="cpu", draft_model=other, context=128)
    with pytest.raises(UsageError, match="two kinds of drafts"):
        RunOptions(draft="ngram", draft_model=other)


def test_a_session_opens_and_closes_its_draft_model(tiny: Callable[..., Path]) -> None:
    with Session.open(tiny("mixtral"), device="cpu", draft_model=tiny("mixtral"), context=256) as session:
        assert isinstance(session.runner.drafts, ModelDrafts) and session.draft is not None
        text = tokens_of(list(session.generate(PROMPTS[0], GREEDY)))
        assert text == plain(session, PROMPTS[0])
        report = session.report()
        assert report.draft is not None and report.draft.kind == "model"
        assert report.memory.ram["draft_model"] > 0
        draft = session.draft
        assert draft.kv_pool.counts.free == draft.kv_pool.counts.count
