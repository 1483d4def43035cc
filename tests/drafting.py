"""Drafts as a test wants them: whatever they cost, of every depth, right and wrong."""

import random
from collections.abc import Callable, Sequence

from offload.batch.draft_policy import DraftPolicy, StepTimes
from offload.batch.ngram import NgramIndex, Proposal
from offload.generate.batch import Batch
from offload.generate.drafts import Drafts
from offload.generate.generator import Generator
from offload.run.session import Session


class AnyDepth(DraftPolicy):
    """Takes any number of what is proposed, for no reason."""

    def __init__(self, seed: int) -> None:
        super().__init__(StepTimes(float, lambda tier: None, 0))
        self._random = random.Random(seed)

    def choose(self, chances: Sequence[Sequence[float]], most: int) -> list[int]:
        depths = []
        for of_one in chances:
            depths.append(self._random.randint(0, min(len(of_one), most)))
            most -= depths[-1]
        return depths


class Recorded:
    """Proposes what follows in ``text``, each token wrong with the chance ``errors``."""

    def __init__(self, text: Sequence[int], errors: float, seed: int) -> None:
        self._text, self._errors, self._random = list(text), errors, random.Random(seed)
        self._at = 0

    def extend(self, tokens: Sequence[int]) -> None:
        self._at = len(tokens) if list(tokens) == self._text[: len(tokens)] else len(self._text)

    def propose(self, most: int) -> Proposal:
        tokens = self._text[self._at : self._at + most]
        drafted = [token if self._random.random() >= self._errors else (token + 1) % 97 for token in tokens]
        return Proposal(drafted, [20] * len(drafted))

    def close(self) -> None:
        pass


class Repeated(NgramIndex):
    """What the text itself says, and anything where it says nothing."""

    def propose(self, most: int) -> Proposal:
        found = super().propose(most)
        return found if found.tokens else Proposal([random.Random(most).randrange(3, 90)] * most, [2] * most)


def draft_by(session: Session, source: Callable[[], object], seed: int = 0) -> Drafts:
    """Have ``session`` draft from what ``source`` makes, to any depth."""
    assert isinstance(session.runner, Batch | Generator)
    session.runner.drafts = drafts = Drafts(AnyDepth(seed), "test", source)  # type: ignore[arg-type]
    return drafts
