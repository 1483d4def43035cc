"""Sequence: one prompt and what has come of it, on its way through the model with others."""

import time
from collections.abc import Sequence as Tokens
from dataclasses import replace

from torch import Tensor

from offload.generate.prompt_cache import KeptText, Load
from offload.generate.runner import Phase, Runner, Used
from offload.generate.sampling import Sampler, TextStream
from offload.generate.stream import Stream
from offload.model.paged_cache import PagedCache
from offload.records import Finish, Reused, Sampling, TokenRecord


class Sequence:
    """A prompt's ``tokens`` and the answer's; those in ``cache`` have been run. ``number`` says who came first;
    ``stream`` is given a record per token. Without ``sampling`` the prompt is computed and nothing is chosen."""

    def __init__(self, number: int, prompt: Tokens[int], sampling: Sampling | None, stream: Stream, room: int) -> None:
        self.number, self.tokens, self.sampling, self.stream = number, list(prompt), sampling, stream
        self.cache: PagedCache | None = None
        self.load: Load | None = None  # what is read of it from disk
        self.kept: KeptText | None = None
        self.reused = Reused()
        self.run: list[TokenRecord] = []
        steps = 1 if sampling is None else min(sampling.max_tokens, room)
        self._end = len(prompt) + steps
        self._last: Finish = "context" if sampling is not None and room < sampling.max_tokens else "length"
        self._tokens_in, self._used = 0, Used()
        self._since: float | None = None

    @property
    def seen(self) -> int:
        """Tokens that have been run."""
        return 0 if self.cache is None else self.cache.get_seq_length()

    @property
    def unseen(self) -> list[int]:
        """Tokens that are still to be run."""
        return self.tokens[self.seen :]

    def begin(self, runner: Runner) -> None:
        """Its turn has come, for the first time or again. Raises UsageError or InputError for a grammar that cannot be
        read."""
        if self._since is not None:
            return
        self._since = time.perf_counter()
        if self.sampling is not None:
            self._sampler = Sampler(self.sampling, runner.grammars)
            stop, special = self.sampling.stop, self.sampling.special_tokens
            self._text = TextStream(runner.parts.tokenizer, stop, special_tokens=special)

    def stop_loading(self) -> None:
        """Nothing more is read into its pages."""
        if self.load is not None:
            self.load.cancel()
            self.load = None

    def count(self, tokens: int, used: Used) -> None:
        """A step has run ``tokens`` of it, and its part of that ``used`` so much."""
        self._tokens_in += tokens
        self._used.add(used)

    def choose(self, logits: Tensor, runner: Runner) -> bool:
        """Choose the token that follows, from ``logits`` ``[vocab]`` after the last, and give its record out; whether
        the text ends with it. Raises CheckpointError for logits that are no numbers."""
        finish: Finish = ""
        token, text, stop, logprobs = -1, "", "", None
        if self.sampling is not None:
            token = self._sampler.pick(logits, self.tokens)
            logprobs = self._sampler.logprobs
            self.tokens.append(token)
            finish = "eos" if token in runner.eos and not self.sampling.ignore_eos else ""
            stopped = False
            if not finish:
                text, stopped = self._text.push(token)
                finish = "stop" if stopped else self._last if len(self.tokens) == self._end else ""
                stop = self._text.met
            if finish and not stopped:
                text += self._text.finish()
        assert self._since is not None
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        phase: Phase = "decode" if self.run else "prefill"
        record = runner.record(phase, token, text, self._tokens_in, seconds, finish, self._used)
        if not self.run:
            record = replace(record, reused=self.reused)
            self.stream.cached_tokens = self.reused.tokens
        if logprobs is not None or stop:
            record = replace(record, logprobs=logprobs, stop=stop)
        self._tokens_in, self._used = 0, Used()
        self.run.append(record)
        self.stream.push(record)
        return bool(finish) or self.sampling is None
