"""What drafts gain on a loaded model: the same texts with and without them, turn about.

Tasks: ``free`` goes on from a text, where n-grams find little. ``quote`` asks for a passage word for word and ``edit``
for it with a name changed, by the chat template where there is one, else by a text that begins to do so: whether the
model then quotes is its own affair, and the acceptance shows it. ``recorded`` needs no such model: what ``free`` gave
is drafted back to it, with so many of the tokens wrong as was asked, which stands for a text that is mostly known.
"""

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from offload.batch.ngram import Proposal
from offload.generate.drafts import Drafts
from offload.records import Sampling, TokenRecord
from offload.run.draft_report import DraftReport, DraftTask
from offload.run.session import Session

_CERTAIN = 17  # evidence: as much as there is
_PASSAGE = 1200  # characters to quote


@dataclass(frozen=True)
class DraftBenchmark:
    """``repeat`` times ``tokens`` decoded after each prompt, with and without drafts; ``errors`` of the tokens of a
    recorded answer are drafted wrongly."""

    prompt_tokens: int = 512
    tokens: int = 64
    repeat: int = 3
    errors: float = 0.1

    def run(self, session: Session, text: str, progress: Callable[[str], None]) -> DraftReport | None:
        """Measure the tasks on ``session``; None if it does not draft."""
        drafts = session.runner.drafts
        if drafts is None:
            return None
        session.reset()
        free = self._free(session, text)
        prompts = {"free": free, **_prompts(session, text)}
        tasks: dict[str, DraftTask] = {}
        for name, prompt in prompts.items():
            progress(f"drafts: {name}")
            tasks[name] = self._task(session, drafts, prompt)
        progress(f"drafts: recorded, {self.errors:.0%} wrong")
        answer = [record.token_id for record in self._once(session, free, drafts=False)]
        recorded = Drafts(drafts.policy, "recorded", lambda: RecordedAnswer([*free, *answer], self.errors))
        session.runner.drafts = recorded
        try:
            tasks["recorded"] = self._task(session, recorded, free)
        finally:
            session.runner.drafts = drafts
        return DraftReport.of_tasks(drafts.kind, tasks)

    def _free(self, session: Session, text: str) -> list[int]:
        ids = session.encode(text)
        return [ids[place % len(ids)] for place in range(self.prompt_tokens)]

    def _task(self, session: Session, drafts: Drafts, prompt: Sequence[int]) -> DraftTask:
        prompt = prompt[-max(1, session.context - self.tokens - 1) :]
        for on in (True, False):
            self._once(session, prompt, drafts=on)  # warm-up: costs and chances are learned
        plain, drafted = list[list[TokenRecord]](), list[list[TokenRecord]]()
        for _ in range(self.repeat):
            plain.append(self._once(session, prompt, drafts=False))
            drafted.append(self._once(session, prompt, drafts=True))
        return DraftTask.of(drafts.kind, [record for run in drafted for record in run], _rate(drafted), _rate(plain))

    def _once(self, session: Session, prompt: Sequence[int], *, drafts: bool) -> list[TokenRecord]:
        sampling = Sampling(max_tokens=self.tokens + 1, ignore_eos=True, drafts=drafts)
        return list(session.generate(prompt, sampling))


class RecordedAnswer:
    """Proposes what comes next in ``text``; each token is wrong with the chance ``errors``, the same ones each time."""

    def __init__(self, text: Sequence[int], errors: float) -> None:
        chance = random.Random(len(text))
        self._text, self._seen = list(text), 0
        self._drafted = [
            self._text[place - 1] if chance.random() < errors else token for place, token in enumerate(self._text)
        ]

    def extend(self, tokens: Sequence[int]) -> None:
        """See Source."""
        self._seen = len(tokens)

    def propose(self, most: int) -> Proposal:
        """See Source."""
        found = self._drafted[self._seen : self._seen + most]
        return Proposal(found, [_CERTAIN] * len(found))

    def close(self) -> None:
        """See Source."""


def _rate(runs: Sequence[Sequence[TokenRecord]]) -> float:
    decoded = [[record.seconds for record in run if record.phase == "decode"] for run in runs]
    return statistics.median(len(seconds) / sum(seconds) for seconds in decoded if seconds)


def _prompts(session: Session, text: str) -> dict[str, list[int]]:
    """What to quote and what to edit."""
    passage = text[:_PASSAGE].rsplit("\n", 1)[0]
    name = max(_names(passage), key=lambda word: (passage.count(word), len(word)), default="the")
    edited = passage.replace(name, f"{name}_new")
    asked = {
        "quote": ("Repeat this text word for word, and say nothing else:", passage),
        "edit": (f"Give this text again with {name} renamed {name}_new everywhere, and say nothing else:", edited),
    }
    if session.tokenizer.chat_template:
        return {
            task: session.encode_chat([{"role": "user", "content": f"{request}\n\n{passage}"}])
            for task, (request, _) in asked.items()
        }
    return {task: session.encode(f"{passage}\n\n{wanted[: len(wanted) // 4]}") for task, (_, wanted) in asked.items()}


def _names(text: str) -> Iterator[str]:
    return (word for word in set(text.split()) if word.isidentifier() and len(word) > 3)
