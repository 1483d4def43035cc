"""Choosing the next token, with transformers' logits processors, and turning tokens into text as they
come."""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from offload.model.detokenizer import Detokenizer
from offload.records import Sampling
from quant.errors import CheckpointError

_LEAST = 1e-30  # temperature: below, single precision knows no difference


class Sampler:
    """Picks tokens by one run's settings; its random numbers depend on ``seed`` only."""

    def __init__(self, sampling: Sampling) -> None:
        self.greedy = sampling.temperature == 0
        self.processors = LogitsProcessorList()
        if sampling.repetition_penalty is not None:
            self.processors.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
        if not self.greedy:
            self.processors.append(_from_best)
            self.processors.append(TemperatureLogitsWarper(max(float(sampling.temperature), _LEAST)))
            if sampling.top_k is not None:
                self.processors.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p is not None:
                self.processors.append(TopPLogitsWarper(float(sampling.top_p)))
            if sampling.min_p is not None:
                self.processors.append(MinPLogitsWarper(float(sampling.min_p)))
        self.generator = torch.Generator()
        if sampling.seed is not None:
            self.generator.manual_seed(sampling.seed)
        else:
            self.generator.seed()

    def pick(self, logits: Tensor, context: Sequence[int]) -> int:
        """The next token after ``context``, from ``logits`` ``[vocab]``.

        Raises CheckpointError if the model's logits are no numbers.
        """
        scores = logits.detach().float().cpu()[None]
        if self.processors:
            scores = self.processors(
                cast(torch.LongTensor, torch.tensor([list(context)])), cast(torch.FloatTensor, scores)
            )
        best = int(scores[0].argmax())  # NaN counts as the greatest
        if not math.isfinite(scores[0, best]):
            raise CheckpointError("the model's logits are not numbers (NaN or infinite): its weights are broken")
        if self.greedy:
            return best
        probabilities = torch.softmax(scores[0], -1)
        return int(torch.multinomial(probabilities, 1, generator=self.generator))


def _from_best(ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
    # The same probabilities; divided by a tiny temperature, the best stays finite.
    return cast(torch.FloatTensor, scores - scores.max())


class TextStream:
    """Text of tokens as they come, up to a stop string. The beginning of one is held back.

    A special token has no text; where a stop string names one, the token takes part in the search as a mark.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        stop = [text for text in stop if text]
        self._marks = _marks(tokenizer, stop)
        self._stop = set(stop)
        for content, mark in sorted(self._marks.values(), key=lambda pair: -len(pair[0])):
            self._stop |= {text.replace(content, mark) for text in self._stop}
        self._text = ""  # certain and not given out, with marks

    def push(self, token: int) -> tuple[str, bool]:
        """Add a token; returns new text and whether a stop string was met (it is not part of the text)."""
        new = self._detokenizer.push(token)
        if not self._stop:
            return new, False
        _, mark = self._marks.get(token, ("", ""))
        seen = self._text + new + self._detokenizer.pending() + mark
        met = min((at for at in map(seen.find, self._stop) if at >= 0), default=None)
        if met is not None:
            return self._shown(seen[:met]), True
        self._text += new + mark
        end = len(self._text) - self._held()
        given, self._text = self._text[:end], self._text[end:]
        return self._shown(given), False

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        return self._shown(self._text) + self._detokenizer.pending()

    def _held(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        sizes = (size for text in self._stop for size in range(1, len(text)) if self._text.endswith(text[:size]))
        return max(sizes, default=0)

    def _shown(self, text: str) -> str:
        return "".join(character for character in text if not "\ud800" <= character <= "\udfff")


def _marks(tokenizer: Any, stop: Sequence[str]) -> dict[int, tuple[str, str]]:
    """Token → its content and mark, for each special token that a stop string names. Marks are lone
    surrogates, which no decoded text has."""
    special = {token: made.content for token, made in tokenizer.added_tokens_decoder.items() if made.special}
    named = [(token, content) for token, content in special.items() if content and content in "\0".join(stop)]
    return {token: (content, chr(0xD800 + place)) for place, (token, content) in enumerate(named)}
