"""Sequence: one prompt and what has come of it, on its way through the model with others."""

import time
from collections.abc import Sequence as Tokens
from dataclasses import replace

from torch import Tensor

from offload.batch.prefixes import Prefix
from offload.batch.token_ids import packed_ids
from offload.generate.answer import Answer
from offload.generate.drafts import Drafts, TextDrafts
from offload.generate.prompt_cache import KeptText, Load
from offload.generate.runner import Chosen, Phase, Runner, Used
from offload.generate.stream import Stream
from offload.model.paged_cache import PagedCache
from offload.records import Reused, Sampling, TokenRecord


class Sequence:
    """A prompt's ``tokens`` and the answer's; those in ``cache`` have been run. ``number`` says who came first;
    ``stream`` is given a record per token. Without ``sampling`` the prompt is computed and nothing is chosen."""

    def __init__(self, number: int, prompt: Tokens[int], sampling: Sampling | None, stream: Stream, room: int) -> None:
        self.number, self.tokens, self.sampling, self.stream = number, packed_ids(prompt), sampling, stream
        self.cache: PagedCache | None = None
        self.drafts: TextDrafts | None = None
        self.load: Load | None = None  # what is read of it from disk
        self.kept: KeptText | None = None
        self.border: Prefix[PagedCache] | None = None  # what was run before a chunk ended, as long as it is kept
        self.reused = Reused()
        self.run: list[TokenRecord] = []
        self._answer: Answer | None = None
        self._room = room
        self._tokens_in, self._used = 0, Used()
        self._since: float | None = None

    @property
    def seen(self) -> int:
        """Tokens that have been run."""
        return 0 if self.cache is None else self.cache.get_seq_length()

    @property
    def unseen(self) -> int:
        """How many tokens are still to be run."""
        return len(self.tokens) - self.seen

    @property
    def draft_room(self) -> int:
        """How many tokens more than the next may be tried in a step, and taken back."""
        if self._answer is None or self.cache is None or self.seen != len(self.tokens) - 1:
            return 0
        return max(0, min(self._answer.room, self.cache.reversible) - 1)

    def begin(self, runner: Runner, drafts: Drafts | None) -> None:
        """Its turn has come, for the first time or again. Raises UsageError or InputError for a grammar that cannot be
        read."""
        if self._since is not None:
            return
        self._since = time.perf_counter()
        if self.sampling is not None:
            self._answer = Answer(self.tokens, self.sampling, runner, self._room)
            if drafts is not None and self.sampling.drafts:
                self.drafts = drafts.begin()

    def take_back(self) -> None:
        """Forget what was run beyond its tokens."""
        chosen = max(len(self.tokens) - 1, 0) if self.sampling is not None else len(self.tokens)
        if self.cache is not None and self.seen > chosen:
            self.cache.rewind(chosen)

    def stop_loading(self) -> None:
        """Nothing more is read into its pages."""
        if self.load is not None:
            self.load.cancel()
            self.load = None

    def close(self) -> None:
        """It is over."""
        self.stop_loading()
        if self._answer is not None and self.run and not self.run[-1].finish:
            self._answer.close()
        if self.drafts is not None:
            self.drafts.close()

    def count(self, tokens: int, used: Used) -> None:
        """A step has run ``tokens`` of it, and its part of that ``used`` so much."""
        self._tokens_in += tokens
        self._used.add(used)

    def choose(self, logits: Tokens[Tensor], draft: Tokens[int], runner: Runner) -> tuple[int, bool]:
        """Choose the tokens that follow by ``logits`` and ``draft``, as Answer does, and give their records out;
        returns how many they are, and whether the text ends with them."""
        chosen = [Chosen(-1)] if self._answer is None else self._answer.tell(self._answer.choose(logits, draft))
        if self.drafts is not None:
            self.drafts.learn([one.token for one in chosen])
        assert self._since is not None
        now = time.perf_counter()
        seconds, self._since = (now - self._since) / len(chosen), now
        phase: Phase = "decode" if self.run else "prefill"
        tokens_in = 1 if self.run else self._tokens_in
        for place, (one, used) in enumerate(zip(chosen, self._used.shares(len(chosen)), strict=True)):
            record = runner.record(phase, one, tokens_in, seconds, used, 0 if place else len(draft), place)
            if not self.run:
                record = replace(record, reused=self.reused)
                self.stream.cached_tokens = self.reused.tokens
            self.run.append(record)
            self.stream.push(record)
        self._tokens_in, self._used = 0, Used()
        return len(chosen), bool(chosen[-1].finish) or self.sampling is None
