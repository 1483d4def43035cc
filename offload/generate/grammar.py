"""Grammars that a text must follow, by llguidance: which tokens may come next."""

from collections.abc import Mapping
from functools import cached_property
from threading import Lock
from typing import Any, cast

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from offload.text.grammar_rules import json_rule
from quant.errors import InputError

ANY_JSON: Mapping[str, Any] = {"type": "object"}


class Grammars:
    """Reads grammars for one model: its ``tokenizer``, the ``vocab_size`` of its logits and the tokens that end a
    text. The model's vocabulary is read with the first grammar, which takes up to a second. Thread-safe."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos: frozenset[int]) -> None:
        self._tokenizer, self._vocab_size, self._eos = tokenizer, vocab_size, eos
        self._reading = Lock()

    def matcher(self, grammar: str) -> "Matcher":
        """What follows one text by ``grammar``. Raises InputError if it cannot be read."""
        made = LLMatcher(self._vocabulary_once(), grammar, log_level=0)
        if made.is_error():
            raise InputError(f"the grammar cannot be followed: {_line(made.get_error())}")
        return Matcher(made, self._vocab_size)

    def _vocabulary_once(self) -> LLTokenizer:
        with self._reading:
            return self._vocabulary

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        try:
            return from_tokenizer(self._tokenizer, n_vocab=self._vocab_size, eos_token=sorted(self._eos) or None)
        except ValueError as error:
            raise InputError(f"this model's tokenizer can follow no grammar: {_line(str(error))}") from None


class Matcher:
    """A place in one text."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._bits = allocate_token_bitmask(1, vocab_size)

    def mask(self, ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """``scores`` ``[1, vocab]`` with -inf for every token that may not come next; a logits processor."""
        fill_next_token_bitmask(self._matcher, self._bits)
        self._check()
        bits = torch.from_numpy(self._bits).view(torch.uint8)[0, :, None]
        allowed = (bits >> torch.arange(8, dtype=torch.uint8)) & 1  # [vocab / 8, 8]: the lowest bit first
        return cast(torch.FloatTensor, scores.masked_fill(allowed.view(1, -1)[:, : scores.shape[1]] == 0, -torch.inf))

    def push(self, token: int) -> None:
        """``token`` was chosen."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InputError(f"the text cannot go on by its grammar: {_line(self._matcher.get_error())}")


def json_grammar(schema: Mapping[str, Any]) -> str:
    """The grammar of JSON texts that ``schema`` allows, as Sampling takes it; whether it can be kept to shows later."""
    return lark_grammar(f"start: value\n{json_rule('value', schema)}")


def lark_grammar(text: str) -> str:
    """A grammar in llguidance's dialect of Lark, as Sampling takes it; whether it can be read shows later."""
    grammar: str = LLMatcher.grammar_from_lark(text)
    return grammar


def _line(said: str) -> str:
    return next((line.strip() for line in said.splitlines() if line.strip()), "no reason given")
