"""Drafts: tokens that probably come next, so that one step can tell of several whether they do.

A drafted token is kept if it is what the sampling chooses there. With a draft that is certain of itself that is
rejection sampling: it is accepted with the probability that the model gives it, and else the choice is among the
others, each as probable as the model says. Penalties, grammars and log probabilities are those of the tokens chosen,
in their order, and with a seed the text is the one that comes without drafts.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from offload.batch.draft_policy import Acceptance, DraftPolicy, StepTimes
from offload.batch.ngram import NgramIndex, Proposal
from offload.hardware.probe import Machine
from offload.records import RunOptions
from offload.tiers import Tier
from quant.model.shape import ModelShape

_DEEPEST = 15  # rows of a step but one


class Source(Protocol):
    """Where the drafts of one text come from."""

    def extend(self, tokens: Sequence[int]) -> None:
        """``tokens`` is the text now."""

    def propose(self, most: int) -> Proposal:
        """At most ``most`` tokens that may follow."""

    def close(self) -> None:
        """The text is over."""


class TextDrafts:
    """What ``source`` proposes for one text, and how often that was right. ``whole`` knows all texts."""

    def __init__(self, source: Source, whole: Acceptance) -> None:
        self.acceptance = Acceptance(whole)
        self.proposal = Proposal([], [])
        self._source = source

    def propose(self, tokens: Sequence[int], most: int) -> None:
        """Have a proposal of at most ``most`` tokens for what follows ``tokens``."""
        self._source.extend(tokens)
        self.proposal = self._source.propose(min(most, _DEEPEST))

    def close(self) -> None:
        """The text is over."""
        self._source.close()

    @property
    def chances(self) -> list[float]:
        """That each token of the proposal is right, if those before it are."""
        return [self.acceptance.of(evidence) for evidence in self.proposal.evidence]

    def learn(self, tokens: Sequence[int]) -> None:
        """``tokens`` is what came."""
        for token, proposed, evidence in zip(tokens, self.proposal.tokens, self.proposal.evidence, strict=False):
            self.acceptance.note(evidence, token == proposed)
            if token != proposed:
                break
        self.proposal = Proposal([], [])


class Drafts:
    """The drafts of a session, as many as ``policy`` wants. ``kind`` is what a report calls them, ``source`` makes that
    of a text."""

    def __init__(self, policy: DraftPolicy, kind: str = "ngram", source: Callable[[], Source] = NgramIndex) -> None:
        self.policy, self.kind, self._source = policy, kind, source

    def begin(self) -> TextDrafts:
        """For a text that begins."""
        return TextDrafts(self._source(), self.policy.acceptance)

    def choose(self, texts: Sequence[tuple[TextDrafts | None, Sequence[int], int]], most: int) -> list[list[int]]:
        """What to run of each text after its next token, ``most`` tokens in all. Each comes with its tokens and how
        many may be drafted; None for one without drafts."""
        for text, tokens, room in texts:
            if text is not None:
                text.propose(tokens, max(room, 1))  # one at least, to learn from
        chances = [[] if text is None else text.chances[:room] for text, _, room in texts]
        depths = self.policy.choose(chances, most)
        return [
            [] if text is None else text.proposal.tokens[:depth]
            for (text, _, _), depth in zip(texts, depths, strict=True)
        ]

    def note(self, sequences: int, drafted: int, tokens: int, seconds: float, read: Mapping[Tier, int]) -> None:
        """See DraftPolicy."""
        self.policy.note(sequences, drafted, tokens, seconds, read)


def drafts_of(options: RunOptions, shape: ModelShape, machine: Machine, dense_bytes: int) -> Drafts | None:
    """The drafts that ``options`` ask for; ``dense_bytes`` are read by every step."""
    return None if options.draft is None else Drafts(DraftPolicy(step_times(shape, machine, dense_bytes)))


def step_times(shape: ModelShape, machine: Machine, dense_bytes: int) -> StepTimes:
    """What steps of a model of ``shape`` take on ``machine``, as far as bytes tell."""
    rates: dict[Tier, float | None] = {"ram": machine.ram_gb_s, "disk": machine.disk_gb_s}

    def union(rows: int) -> float:
        experts, top_k = shape.num_experts, shape.top_k
        return experts * (1 - (1 - top_k / experts) ** rows) / top_k if top_k else 1.0

    return StepTimes(union, rates.get, dense_bytes)
