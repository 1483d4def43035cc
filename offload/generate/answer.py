"""Answer: the tokens that follow a prompt, the text that they make, and where it ends.

Legend: V vocabulary.
"""

from collections.abc import MutableSequence, Sequence

from torch import Tensor

from offload.generate.runner import Chosen, Runner
from offload.generate.sampling import Sampler, TextStream
from offload.records import Finish, Sampling


class Answer:
    """What follows ``tokens``, of which it makes one sequence, by ``sampling``; ``room`` tokens may follow.

    Raises UsageError or InputError for a grammar that cannot be read.
    """

    def __init__(self, tokens: MutableSequence[int], sampling: Sampling, runner: Runner, room: int) -> None:
        self.tokens, self._end = tokens, len(tokens) + min(sampling.max_tokens, room)
        self._last: Finish = "context" if room < sampling.max_tokens else "length"
        self._ends = frozenset[int]() if sampling.ignore_eos else runner.eos
        self._own = runner.parts.own
        self._sampler = Sampler(sampling, runner.grammars)
        self._text = TextStream(runner.parts.tokenizer, sampling.stop, special_tokens=sampling.special_tokens)

    @property
    def room(self) -> int:
        """How many tokens may still follow."""
        return self._end - len(self.tokens)

    def choose(self, logits: Sequence[Tensor], draft: Sequence[int]) -> list[Chosen]:
        """The tokens that follow by ``logits``, 1 + len(draft) of ``[V]``, after the last and after each of ``draft``:
        one, and one more for each token of the draft that was chosen. They have no text yet. Raises CheckpointError for
        logits that are no numbers."""
        chosen: list[Chosen] = []
        for row, drafted in zip(logits, (*draft, -1), strict=True):
            token = self._sampler.pick(row, self.tokens)
            self.tokens.append(token)
            finish: Finish = "eos" if token in self._ends else "" if self.room else self._last
            chosen.append(Chosen(token, finish=finish, logprobs=self._sampler.logprobs))
            if finish or token != drafted:
                break
        return chosen

    def tell(self, chosen: Sequence[Chosen]) -> list[Chosen]:
        """``chosen`` with their texts, up to where a stop string is met: what came after it is forgotten."""
        told: list[Chosen] = []
        for one in chosen:
            text, stopped = ("", False) if one.finish == "eos" else self._text.push(one.token)
            finish: Finish = "stop" if stopped else one.finish
            if finish and not stopped:
                text += self._text.finish()
            told.append(Chosen(one.token, text, finish, self._text.met, one.logprobs))
            if stopped:
                del self.tokens[len(self.tokens) - len(chosen) + len(told) :]
                break
        if told[-1].finish:  # before anybody hears of it and goes on
            self.close()
        return told

    def close(self) -> None:
        """No more tokens follow: prompts that go on from here may have them."""
        self._own.remember(self.tokens)
