"""A draft model beside a session's own: opened, checked, counted, and put to work."""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

from offload.batch.draft_policy import DraftPolicy
from offload.decode.decoder import Decoder
from offload.experts.cache.expert_cache import ExpertCache
from offload.experts.storage.store import ExpertStore
from offload.generate.drafts import step_times
from offload.generate.model_drafts import DraftModel, ModelDrafts
from offload.generate.runner import Runner
from offload.hardware.ledger import MemoryLedger
from offload.hardware.probe import Machine
from offload.model.page_pool import PagePool
from offload.model.paged_cache import PagedCache
from offload.plan.plan import Plan
from offload.plan.planned_run import PlannedRun
from quant.checkpoint.checkpoint import Checkpoint
from quant.errors import UsageError
from quant.model.hub import resolve_model
from quant.model.shape import ModelShape

_SAMPLE = "Drafts: 3 tokens of 100 %,\n\tand «each» as the other says it."


class Drafting(Protocol):
    """What drafts for another or has somebody do so: a session."""

    tokenizer: Any
    shape: ModelShape
    machine: Machine
    plan: Plan
    context: int
    notes: list[str]
    ledger: MemoryLedger
    decoder: Decoder
    experts: ExpertCache
    kv_pool: PagePool
    runner: Runner

    def finish_filling(self) -> None:
        """Wait until every expert is in its slot."""

    def close(self) -> None:
        """Close files and end threads."""


Made = TypeVar("Made", bound=Drafting)
Opens = Callable[[ExpertStore, PlannedRun, torch.device], Made]


def begin_drafting(session: Made, run: PlannedRun, opens: Opens[Made]) -> Made | None:
    """The session of the model that ``run`` plans for drafts, if any, made by ``opens``, with which ``session`` drafts
    from now on. Raises UsageError if it has another tokenizer, and what opening a session does; nothing is left open
    then."""
    if run.draft is None or run.options.draft_model is None:
        return None
    name, draft = str(run.options.draft_model), None
    try:
        draft = opens(ExpertStore(Checkpoint.open(resolve_model(name))), run.draft, torch.device("cpu"))
        _check(session, draft, name)
        draft.finish_filling()
    except BaseException:
        for opened in (draft, session):
            if opened is not None:
                opened.close()
        raise
    session.ledger.add("ram", "draft_model", sum(draft.ledger.entries["ram"].values()))
    model = DraftModel(
        draft.decoder,
        draft.experts,
        partial(PagedCache, draft.kv_pool),
        tokens=len(session.tokenizer),
        context=min(draft.context, session.context),
        chunk=draft.plan.prompt_chunk,
        notes=session.notes,
    )
    times = step_times(session.shape, session.machine, session.runner.parts.dense_bytes)
    session.runner.drafts = ModelDrafts(DraftPolicy(times), model)
    return draft


def _check(session: Drafting, draft: Drafting, name: str) -> None:
    if draft.decoder.bound is not None:
        raise UsageError(
            f"the draft model {name} is a {draft.shape.family.name} model, whose attention is transformers' own "
            "and holds one text: expected one whose attention is computed here"
        )
    ours, theirs = session.tokenizer, draft.tokenizer
    if ours.get_vocab() == theirs.get_vocab() and ours.encode(_SAMPLE) == theirs.encode(_SAMPLE):
        return
    raise UsageError(
        f"the draft model {name} has another tokenizer ({len(theirs):,} tokens, this model's has {len(ours):,}): "
        "expected one that makes the same tokens of a text"
    )
