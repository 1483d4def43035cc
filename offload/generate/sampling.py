"""Choosing the next token, with transformers' logits processors, and turning tokens into text as they
come."""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from offload.generate.grammar import Grammars, Matcher
from offload.records import Logprobs, Sampling
from offload.text.detokenizer import Detokenizer
from quant.errors import CheckpointError, UsageError

_LEAST = 1e-30  # temperature: below, single precision knows no difference


class Sampler:
    """Picks tokens by one run's settings; its random numbers depend on ``seed`` only.

    ``logprobs`` are those of the latest token, if they were asked for. ``grammars`` reads the settings' grammar;
    raises UsageError where there is none to read it, InputError for a grammar that it cannot read.
    """

    def __init__(self, sampling: Sampling, grammars: Grammars | None = None) -> None:
        self.greedy = sampling.temperature == 0
        self.logprobs: Logprobs | None = None
        self._top = sampling.logprobs
        self._matcher = None if sampling.grammar is None else _read(sampling.grammar, grammars)
        # Called one by one: transformers' list of them looks up each one's signature for every token.
        self.processors: list[Callable[[torch.LongTensor, torch.FloatTensor], Tensor]] = []
        if sampling.repetition_penalty is not None:
            self.processors.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
        if sampling.presence_penalty or sampling.frequency_penalty:
            self.processors.append(AnswerPenalty(sampling.presence_penalty or 0.0, sampling.frequency_penalty or 0.0))
        self._look_back = bool(self.processors)  # those that follow take no notice of what came before
        bias: list[list[list[int] | float]] = [
            [[token], float(value)] for token, value in sampling.logit_bias.items() if value
        ]
        if bias:
            self.processors.append(SequenceBiasLogitsProcessor(bias))
        if self._matcher is not None:
            self.processors.append(self._matcher.mask)
        if not self.greedy:
            self.processors.append(_from_best)
            self.processors.append(TemperatureLogitsWarper(max(float(sampling.temperature), _LEAST)))
            if sampling.top_k is not None:
                self.processors.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p is not None:
                self.processors.append(TopPLogitsWarper(float(sampling.top_p)))
            if sampling.min_p is not None:
                self.processors.append(MinPLogitsWarper(float(sampling.min_p)))
        self._plain = self.greedy and not self.processors and self._top is None
        self.generator = torch.Generator()
        if sampling.seed is not None:
            self.generator.manual_seed(sampling.seed)
        else:
            self.generator.seed()

    def pick(self, logits: Tensor, context: Sequence[int]) -> int:
        """The next token after ``context``, from ``logits`` ``[vocab]``.

        Raises CheckpointError if the model's logits are no numbers.
        """
        if self._plain and logits.dtype == torch.float32 and logits.device.type == "cpu":
            values = logits.numpy()
            best = int(values.argmax())
            _check(float(values[best]))
            return best
        own = scores = logits.detach().float().cpu()[None]
        if self.processors:
            before = context if self._look_back else context[-1:]
            seen = [token for token in before if token < scores.shape[1]]  # a row of an image is no token of a text
            ids = cast(torch.LongTensor, torch.tensor([seen]))
            for processor in self.processors:
                scores = processor(ids, cast(torch.FloatTensor, scores))
        best = int(scores[0].argmax())  # NaN counts as the greatest
        _check(float(scores[0, best]))
        token = best
        if not self.greedy:
            probabilities = torch.softmax(scores[0], -1)
            token = int(torch.multinomial(probabilities, 1, generator=self.generator))
        if self._matcher is not None:
            self._matcher.push(token)
        if self._top is not None:
            self.logprobs = _logprobs(own[0], token, self._top)
        return token


def _check(logit: float) -> None:
    if not math.isfinite(logit):
        raise CheckpointError("the model's logits are not numbers (NaN or infinite): its weights are broken")


class AnswerPenalty(LogitsProcessor):
    """OpenAI's penalties, which transformers has none of: a token that the answer has ``count`` times loses
    ``count × frequency + presence`` of its logit. What comes before the first call is the prompt."""

    def __init__(self, presence: float, frequency: float) -> None:
        self.presence, self.frequency = presence, frequency
        self._prompt: int | None = None

    def __call__(self, ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """``scores`` ``[1, vocab]`` after ``ids`` ``[1, T]``, penalized."""
        if self._prompt is None:
            self._prompt = ids.shape[1]
        counts = torch.bincount(ids[0, self._prompt :], minlength=scores.shape[1]).to(scores.dtype)
        return cast(torch.FloatTensor, scores - self.frequency * counts - self.presence * (counts > 0))


def _read(grammar: str, grammars: Grammars | None) -> Matcher:
    if grammars is None:
        raise UsageError("a grammar needs the model's tokenizer: generate by a session")
    return grammars.matcher(grammar)


def _logprobs(logits: Tensor, token: int, count: int) -> Logprobs:
    """Of ``token`` and the ``count`` likeliest, from ``logits`` ``[vocab]``."""
    every = torch.log_softmax(logits, -1)
    values, ids = every.topk(min(count, len(every)))
    return Logprobs(float(every[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def _from_best(ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
    # The same probabilities; divided by a tiny temperature, the best stays finite.
    return cast(torch.FloatTensor, scores - scores.max())


class TextStream:
    """Text of tokens as they come, up to a stop string. The beginning of one is held back.

    A special token has no text unless ``special_tokens``; where a stop string names one, the token takes part in
    the search as a mark. ``met`` is the stop string that ended the text.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], *, special_tokens: bool = False) -> None:
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=not special_tokens)
        stop = [text for text in stop if text]
        self.met = ""
        self._marks = {} if special_tokens else _marks(tokenizer, stop)
        self._stop = {text: text for text in stop}  # as it is met: as it was given
        for content, mark in sorted(self._marks.values(), key=lambda pair: -len(pair[0])):
            self._stop |= {text.replace(content, mark): given for text, given in self._stop.items()}
        self._text = ""  # certain and not given out, with marks

    def push(self, token: int) -> tuple[str, bool]:
        """Add a token; returns new text and whether a stop string was met (it is not part of the text)."""
        new = self._detokenizer.push(token)
        if not self._stop:
            return new, False
        _, mark = self._marks.get(token, ("", ""))
        seen = self._text + new + self._detokenizer.pending() + mark
        at, met = min(((at, text) for text in self._stop if (at := seen.find(text)) >= 0), default=(-1, ""))
        if met:
            self.met = self._stop[met]
            return self._shown(seen[:at]), True
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
