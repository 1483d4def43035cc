"""Drafts by a second, smaller model: what it would say next, greedily, is tried on the large one.

It has the large one's tokenizer and a KV cache of its own, in which what was rejected is taken back and what was chosen
instead is run with the next proposal. Unlike a text's own words this costs time whether it helps or not, so how deep to
draft is decided before anything is drafted, by what a drafted token takes and how often one was right; what it took
counts against what it won.

Legend: V vocabulary.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from offload.batch.draft_policy import DraftPolicy
from offload.batch.ngram import Proposal
from offload.batch.pages import OutOfPages
from offload.decode.decoder import Decoder
from offload.experts.cache.expert_cache import ExpertCache
from offload.generate.drafts import Drafts, TextDrafts
from offload.model.kv_cache import SequenceCache
from offload.tiers import Tier
from quant.errors import ColdstreamError
from quant.kernels.stack import MAX_ROWS

_SURE = ((0.3, 2), (0.5, 3), (0.7, 4), (0.85, 6), (0.95, 9))  # the draft's own probability below which evidence is so
_SUREST = 17
_SMOOTH = 0.1  # of a new measurement
_SHORTEST_PAUSE, _LONGEST_PAUSE = 16, 1024  # steps after which it is tried again whether drafts pay


class DraftModel:
    """The second model: ``decoder`` with ``experts`` and caches by ``new_cache``, or the one it is bound to. ``tokens``
    are the ids that both models know, ``context`` what a cache holds, ``chunk`` what is run at once of a prompt.
    ``notes`` gets what a user should know."""

    def __init__(
        self,
        decoder: Decoder,
        experts: ExpertCache,
        new_cache: Callable[[], SequenceCache],
        *,
        tokens: int,
        context: int,
        chunk: int,
        notes: list[str],
    ) -> None:
        self.decoder, self.experts, self.new_cache = decoder, experts, new_cache
        self.tokens, self.context, self.chunk, self._notes = tokens, context, chunk, notes
        self.seconds = 0.0  # that drafting took since somebody asked last, prompts left out
        self.drafted = 0
        self.failed = False

    def begin(self) -> "ModelDraft":
        """For a text that begins."""
        return ModelDraft(self)

    def run(self, ids: Sequence[int], cache: SequenceCache) -> Tensor:
        """Logits ``[V]`` after ``ids``, which go on what is in ``cache``."""
        logits = torch.empty(0)
        with torch.inference_mode():
            for start in range(0, len(ids), self.chunk):
                part = ids[start : start + self.chunk]
                few = len(part) <= MAX_ROWS and self.decoder.bound is None
                logits = self.decoder.forward_rows([(part, cache)]) if few else self.decoder.forward(part, cache)
        self.decoder.flush()
        self.experts.take_counters()
        self.decoder.attend()
        return logits[-1, : self.tokens]

    def fail(self, error: ColdstreamError) -> None:
        """Draft no more: the text goes on without."""
        self.failed = True
        self._notes.append(f"no drafts any more: the draft model failed ({error})")


class ModelDraft:
    """One text as the draft model has run it: a Source."""

    def __init__(self, model: DraftModel) -> None:
        self._model, self._text = model, list[int]()
        self._cache: SequenceCache | None = None
        self._run: list[int] = []  # what is in the cache

    def extend(self, tokens: Sequence[int]) -> None:
        """See Source."""
        self._text = list(tokens)

    def propose(self, most: int) -> Proposal:
        """See Source. Evidence is how sure the draft model is."""
        model, text = self._model, self._text
        most = min(most, model.context - len(text))
        if most < 1 or not text or model.failed or max(text) >= model.tokens:
            return Proposal([], [])
        found = Proposal([], [])
        try:
            self._draft(found, most)
        except OutOfPages:  # longer texts, or more of them, than were planned for
            self.close()
            return Proposal([], [])
        except ColdstreamError as error:
            self.close()
            model.fail(error)
            return Proposal([], [])
        model.drafted += len(found.tokens)
        return found

    def _draft(self, found: Proposal, most: int) -> None:
        model, first = self._model, self._cache is None
        if self._cache is None:
            self._cache = model.new_cache()
            self._run = []
        started = time.perf_counter()
        self._go_back(len(self._text) - 1)
        logits = self._forward(self._text[len(self._run) :])
        if first:  # a prompt is run once
            started = time.perf_counter()
        while True:
            best = int(logits.argmax())
            sure = math.exp(float(logits[best] - torch.logsumexp(logits.float(), 0)))
            found.tokens.append(best)
            found.evidence.append(next((level for below, level in _SURE if sure < below), _SUREST))
            if len(found.tokens) == most:
                break
            logits = self._forward([best])
        model.seconds += time.perf_counter() - started

    def _forward(self, ids: list[int]) -> Tensor:
        assert self._cache is not None
        before = len(self._run)
        try:
            logits = self._model.run(ids, self._cache)
        except BaseException:
            self._run = self._run[: self._cache.rewind(before)]
            raise
        self._run += ids
        return logits

    def _go_back(self, most: int) -> None:
        """Leave what the text begins with in the cache, ``most`` tokens of it."""
        assert self._cache is not None
        common = min(len(self._run), most)
        if self._run[:common] != self._text[:common]:
            common = next(i for i in range(common) if self._run[i] != self._text[i])
        if len(self._run) > common:
            self._run = self._run[: self._cache.rewind(common)]

    def close(self) -> None:
        """See Source: the pages are somebody else's."""
        if self._cache is not None:
            self._cache.rewind(0)
            self._cache, self._run = None, []


class ModelDrafts(Drafts):
    """What ``model`` proposes for the texts of a session, as many tokens as ``policy`` wants."""

    def __init__(self, policy: DraftPolicy, model: DraftModel) -> None:
        super().__init__(policy, "model", model.begin)
        self._model = model
        self._each: float | None = None  # seconds of a drafted token
        self._cost = 0.0  # of the proposals for the next step
        self._idle, self._pause = 0, 0

    def choose(self, texts: Sequence[tuple[TextDrafts | None, Sequence[int], int]], most: int) -> list[list[int]]:
        """See Drafts. What is not worth it is not proposed, but now and then, to learn whether it is by now."""
        able = [(text, tokens, room) for text, tokens, room in texts if text is not None and room > 0]
        depth = self._depth(len(texts), len(able), most) if able else 0
        model = self._model
        model.seconds, model.drafted = 0.0, 0
        for text, tokens, room in able if depth else ():
            text.propose(tokens, min(depth, room))
        self._cost = model.seconds
        if model.drafted:
            each = model.seconds / model.drafted
            self._each = each if self._each is None else self._each + _SMOOTH * (each - self._each)
        chances = [[] if text is None else text.chances[:room] for text, _, room in texts]
        depths = self.policy.choose(chances, most)
        return [
            [] if text is None else text.proposal.tokens[:taken]
            for (text, _, _), taken in zip(texts, depths, strict=True)
        ]

    def _depth(self, sequences: int, able: int, most: int) -> int:
        if not self.policy.may_lose(able * (self._each or 0.0)):
            return 0
        if self._each is None:
            return 1
        depth = self.policy.depth(sequences, able, most // able, self._each)
        if depth:
            self._idle, self._pause = 0, _SHORTEST_PAUSE
            return depth
        self._idle += 1
        if self._idle <= self._pause:
            return 0
        self._idle, self._pause = 0, min(2 * self._pause + 1, _LONGEST_PAUSE)
        return 1

    def note(self, sequences: int, drafted: int, tokens: int, seconds: float, read: Mapping[Tier, int]) -> None:
        """See Drafts: what proposing took is a cost, whether anything was tried or not."""
        self.policy.note(sequences, drafted, tokens, seconds, read, self._cost)
        self._cost = 0.0
