"""Prefill and decode measured apart on a loaded model, after a warm-up, several times.

Each repetition runs another stretch of the text, so that a prompt never finds the experts that the same
prompt left behind, and then decodes greedily through any end of text. The prompts may come after many tokens that are
in the KV cache already, with random keys and values: what a long context costs shows without computing it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from offload.generate.batch import Batch
from offload.model.random_pages import random_sequence
from offload.records import Sampling, TokenRecord
from offload.run.session import Session
from quant.errors import InputError, UsageError


@dataclass(frozen=True)
class Benchmark:
    """What is measured: ``repeat`` times a prompt of ``prompt_tokens`` and then ``tokens`` decoded ones, after
    ``filled`` tokens of random keys and values."""

    prompt_tokens: int = 512
    tokens: int = 64
    repeat: int = 3
    filled: int = 0

    @property
    def context(self) -> int:
        """Tokens that the KV cache must hold."""
        return self.filled + self.prompt_tokens + self.tokens + 1

    def run(
        self, session: Session, text: str, progress: Callable[[str], None] | None = None
    ) -> list[list[TokenRecord]]:
        """The records of each repetition, without the warm-up. Raises InputError if ``text`` is empty, UsageError if
        there are to be random keys and values and they do not lie in pages of this process's memory."""
        say = progress or (lambda line: None)
        if not text.strip():
            raise InputError("the text to measure with is empty: expected some prose or code")
        ids = session.encode(text)
        if session.prompts is not None:
            session.prompts.reads = False  # what is measured is computed
        say("warm-up")
        self._once(session, self.prompt(ids, 0), min(self.tokens, 16))
        session.finish_filling()
        runs = []
        for index in range(self.repeat):
            say(f"run {index + 1} of {self.repeat}")
            runs.append(self._once(session, self.prompt(ids, index + 1), self.tokens))
        if self.filled:
            session.reset()  # nobody is to find what was not computed
        return runs

    def from_disk(self, session: Session, text: str) -> TokenRecord | None:
        """The prefill of the last prompt of ``run`` once more, read from the prompt cache as far as it can be; None if
        nothing of it can."""
        if session.prompts is None:
            return None
        session.save_prompts()
        session.prompts.reads = True
        record = self._once(session, self.prompt(session.encode(text), self.repeat), 1)[0]
        return record if record.reused.disk else None

    def prompt(self, ids: Sequence[int], index: int) -> list[int]:
        """The prompt of repetition ``index``: another stretch of ``ids`` each time."""
        start = index * self.prompt_tokens
        return [ids[(start + place) % len(ids)] for place in range(self.prompt_tokens)]

    def _once(self, session: Session, prompt: Sequence[int], tokens: int) -> list[TokenRecord]:
        session.reset()
        if self.filled:
            before = [prompt[place % len(prompt)] for place in range(self.filled)]
            session.engine.call(lambda: _begin_with(before, session))
            prompt = [*before, *prompt]
        # One more than is measured: the first token comes out of the prefill.
        return list(session.generate(prompt, Sampling(max_tokens=tokens + 1, ignore_eos=True, drafts=False)))


def _begin_with(tokens: Sequence[int], session: Session) -> None:
    """Let the runner find ``tokens`` in its cache, though nobody has computed them."""
    runner = session.runner
    if not isinstance(runner, Batch) or session.device.type != "cpu" or session.prompts is not None:
        raise UsageError(
            "random keys and values are for a model whose attention is computed on the CPU, without a prompt cache: "
            "leave --filled out"
        )
    runner.prefixes.keep(tokens, random_sequence(runner.pool, len(tokens)))
