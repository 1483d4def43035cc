"""Choosing the next token, with transformers' logits processors, and turning tokens into text as they
come."""

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

from offload.records import Sampling
from quant.errors import UsageError


class Sampler:
    """Picks tokens by one run's settings; its random numbers depend on ``seed`` only."""

    def __init__(self, sampling: Sampling) -> None:
        self.greedy = sampling.temperature == 0
        self.processors = LogitsProcessorList()
        try:
            if sampling.repetition_penalty is not None:
                self.processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
            if not self.greedy:
                self.processors.append(TemperatureLogitsWarper(sampling.temperature))
                if sampling.top_k is not None:
                    self.processors.append(TopKLogitsWarper(sampling.top_k))
                if sampling.top_p is not None:
                    self.processors.append(TopPLogitsWarper(sampling.top_p))
                if sampling.min_p is not None:
                    self.processors.append(MinPLogitsWarper(sampling.min_p))
        except ValueError as error:
            raise UsageError(f"bad sampling setting: {str(error).strip()}") from None
        self.generator = torch.Generator()
        if sampling.seed is not None:
            self.generator.manual_seed(sampling.seed)
        else:
            self.generator.seed()

    def pick(self, logits: Tensor, context: Sequence[int]) -> int:
        """The next token after ``context``, from ``logits`` ``[vocab]``."""
        scores = logits.detach().float().cpu()[None]
        if self.processors:
            scores = self.processors(
                cast(torch.LongTensor, torch.tensor([list(context)])), cast(torch.FloatTensor, scores)
            )
        if self.greedy:
            return int(scores[0].argmax())
        probabilities = torch.softmax(scores[0], -1)
        return int(torch.multinomial(probabilities, 1, generator=self.generator))


class TextStream:
    """Text of tokens as they come: what is certain is given out, an unfinished character or the beginning of
    a stop string is held back."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(text for text in stop if text)
        self._ids: list[int] = []
        self._given = 0
        self._text = ""
        self._in_arena = 0  # tokens before this one no longer change what follows

    def push(self, token: int) -> tuple[str, bool]:
        """Add a token; returns new text and whether a stop string was met (it is not part of the text)."""
        self._ids.append(token)
        tail = self.tokenizer.decode(self._ids[self._in_arena :], skip_special_tokens=True)
        if tail.endswith("\ufffd") and len(self._ids) - self._in_arena < 16:
            return "", False
        prefix = self._text[: self._base]
        self._text = prefix + tail
        self._settle()
        for text in self.stop:
            at = self._text.find(text, max(0, self._given - len(text)))
            if at >= 0:
                new, self._given = self._text[self._given : at], at
                return new, True
        end = len(self._text) - self._held()
        new, self._given = self._text[self._given : end], max(end, self._given)
        return new, False

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        rest, self._given = self._text[self._given :], len(self._text)
        return rest

    _base = 0

    def _settle(self) -> None:
        # Decoding is not linear in the tokens, so the last few are decoded again with each new one; older are
        # not.
        if len(self._ids) - self._in_arena > 32:
            keep = self._ids[-8:]
            kept = self.tokenizer.decode(keep, skip_special_tokens=True)
            if self._text.endswith(kept) and not kept.startswith("\ufffd"):
                self._in_arena = len(self._ids) - 8
                self._base = len(self._text) - len(kept)

    def _held(self) -> int:
        longest = 0
        for text in self.stop:
            for size in range(min(len(text) - 1, len(self._text)), longest, -1):
                if self._text.endswith(text[:size]):
                    longest = size
                    break
        return longest
