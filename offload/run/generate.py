"""Prefill and decode: token ids in, one record per step out.

The KV cache outlives a call. A prompt is always the whole conversation; what the cache already holds of it is
not run again. A step that is interrupted leaves the cache as it was before the step.

A decoder that can begins a token's step as soon as the token is known: its record, its text and whatever the
caller does with them take their time while the step runs. A step that nobody comes back for is dropped.
"""

import collections.abc
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from offload.decode.decoder import Decoder
from offload.experts.cache.expert_cache import Counters, ExpertCache
from offload.experts.cache.oom import retry_with_less_vram
from offload.hardware.ledger import resident_bytes
from offload.hardware.vram_limit import VramMeter
from offload.model.kv_cache import SequenceCache
from offload.model.tokenizer import check_ids
from offload.records import Finish, Sampling, TokenRecord
from offload.run.grammar import Grammars
from offload.run.sampling import Sampler, TextStream
from offload.tiers import Tier
from quant.errors import BudgetError, UsageError

Phase = Literal["prefill", "decode"]
_KEPT_RUNS = 16


class Generator:
    """Runs one sequence through a model by ``decoder``. ``dense_bytes`` is what every forward pass reads besides
    experts from ``home``, where dense weights and KV cache are.

    ``known_ids`` tells below which number token ids are known: images add to them. ``after_first`` is called
    once, when the first token has been given out and another is asked for: it does what would only delay that
    token. ``runs`` are the records of the latest calls.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Any,
        cache: SequenceCache,
        experts: ExpertCache,
        *,
        dense_bytes: int,
        prompt_chunk: int,
        vocab_size: int,
        known_ids: Callable[[], int],
        eos: frozenset[int],
        home: Tier,
        vram: VramMeter | None = None,
        after_first: Callable[[], None] | None = None,
    ) -> None:
        self.decoder, self.tokenizer, self.cache, self.experts = decoder, tokenizer, cache, experts
        self.dense_bytes, self.prompt_chunk, self.eos, self.home = dense_bytes, prompt_chunk, eos, home
        self._known_ids, self._vram = known_ids, vram
        self.grammars = Grammars(tokenizer, vocab_size, eos)
        self._after_first, self._begun = after_first, False
        self.tokens: list[int] = []  # what the cache holds
        self.runs: deque[list[TokenRecord]] = deque(maxlen=_KEPT_RUNS)
        self._turn = 0  # counts who may go on: a later call ends an earlier one

    def reset(self) -> None:
        """Forget the sequence."""
        self._take_turn()
        self.cache.reset()  # type: ignore[no-untyped-call]
        self.tokens = []

    def check(self, prompt: Sequence[int], sampling: Sampling) -> int:
        """How many tokens may follow ``prompt``.

        Raises UsageError for an empty prompt, CheckpointError for a token that the model does not know and
        BudgetError for a prompt that does not fit the planned context.
        """
        if not prompt:
            raise UsageError("the prompt is empty: expected at least one token")
        check_ids(prompt, self._known_ids())
        room = self.cache.context - len(prompt)
        if room < 1:
            raise BudgetError(
                f"the prompt has {len(prompt):,} tokens and the KV cache is planned for "
                f"{self.cache.context:,}: {self.cache.remedy(len(prompt) + 1, len(prompt) + sampling.max_tokens)}"
            )
        return room

    def generate(self, prompt: Sequence[int], sampling: Sampling) -> collections.abc.Generator[TokenRecord, None, None]:
        """Yield the prefill's record and then one per decoded token; raises what ``check`` does."""
        room = self.check(prompt, sampling)
        turn = self._take_turn()
        try:
            yield from self._steps(list(prompt), sampling, room, turn)
        finally:
            if turn == self._turn:
                self.decoder.drop()

    def _steps(self, context: list[int], sampling: Sampling, room: int, turn: int) -> Iterator[TokenRecord]:
        self.finish_load()
        sampler = Sampler(sampling, self.grammars)
        text = TextStream(self.tokenizer, sampling.stop, special_tokens=sampling.special_tokens)
        run: list[TokenRecord] = []
        self.runs.append(run)
        steps = min(sampling.max_tokens, room)
        last: Finish = "context" if room < sampling.max_tokens else "length"
        started = time.perf_counter()
        step_ids = self._unseen(context)
        logits = self._prefill(step_ids)
        for step in range(steps):
            token = sampler.pick(logits, context)
            context.append(token)
            known = time.perf_counter()
            finish: Finish = "eos" if token in self.eos and not sampling.ignore_eos else ""
            launched, counters = self._go_on(None if finish or step == steps - 1 else token)
            new, stopped = ("", False) if finish else text.push(token)
            finish = finish or ("stop" if stopped else last if step == steps - 1 else "")
            if finish:
                self.decoder.drop()  # a stop string was met: nobody wants the next token
                new += "" if stopped else text.finish()
            seconds = (known if launched else time.perf_counter()) - started
            phase: Phase = "decode" if step else "prefill"
            record = self._record(phase, token, new, len(step_ids), seconds, finish, counters)
            if sampler.logprobs is not None or stopped:
                record = replace(record, logprobs=sampler.logprobs, stop=text.met)
            run.append(record)
            given = time.perf_counter()
            yield record
            asked = time.perf_counter()
            if finish:
                return
            if turn != self._turn:
                raise UsageError("another generation has begun on this model: this one cannot go on")
            self.finish_load()
            started = known if launched else time.perf_counter()
            step_ids = [token]
            logits = self._forward(step_ids)
            if launched:  # time that the caller took is the step's as far as it ran meanwhile
                started += max(0.0, asked - max(given, self.decoder.ended_at))

    def prefill(self, prompt: Sequence[int]) -> TokenRecord:
        """Run ``prompt`` through the model without choosing a token; the record's ``token_id`` is -1."""
        check_ids(prompt, self._known_ids())
        self._take_turn()
        self.finish_load()
        started = time.perf_counter()
        ids = self._unseen(list(prompt))
        self._prefill(ids)
        _, counters = self._go_on(None)
        record = self._record("prefill", -1, "", len(ids), time.perf_counter() - started, "", counters)
        self.runs.append([record])
        return record

    def _take_turn(self) -> int:
        self.decoder.drop()
        self._turn += 1
        return self._turn

    def _go_on(self, token: int | None) -> tuple[bool, Counters]:
        """Begin the step of ``token``, if there is one and the decoder can before it is asked to. Returns
        whether it was begun, and what the step before counted."""
        ahead = token is not None and self._after_first is None and self.decoder.launch(token)
        self.decoder.flush()
        counters = self.experts.take_counters()
        self.decoder.attend()
        return ahead, counters

    def finish_load(self, *, now: bool = False) -> None:
        """Do what was put off until after the first token, if that has been or ``now``."""
        if self._after_first is not None and (self._begun or now):
            self._after_first()
            self._after_first = None

    def _unseen(self, prompt: list[int]) -> list[int]:
        """The part of ``prompt`` that the cache does not hold, at least its last token; the rest is kept."""
        common = 0
        for have, want in zip(self.tokens, prompt[:-1], strict=False):
            if have != want:
                break
            common += 1
        kept = self.cache.rewind(common)
        self.tokens = self.tokens[:kept]
        return prompt[kept:]

    def _prefill(self, ids: Sequence[int]) -> Tensor:
        logits = torch.empty(0)
        for start in range(0, len(ids), self.prompt_chunk):
            logits = self._forward(ids[start : start + self.prompt_chunk])
        return logits

    def _forward(self, ids: Sequence[int]) -> Tensor:
        """Run ``ids`` and return the last token's logits ``[vocab]``. Raises MachineError if the GPU fails or
        has no memory left."""
        whole = [*self.tokens, *ids]
        # A try that failed may have cost some of the tokens before, too.
        return retry_with_less_vram(lambda: self._try(whole[len(self.tokens) :]), self.experts)

    def _try(self, ids: Sequence[int]) -> Tensor:
        before = len(self.tokens)
        try:
            with torch.inference_mode():
                logits = self.decoder.forward(ids, self.cache)[-1]
            self.experts.check_files()
        except BaseException:  # KeyboardInterrupt too: some layers have seen the tokens, others not
            self.tokens = self.tokens[: self.cache.rewind(before)]
            raise
        self.tokens.extend(ids)
        return logits

    def _record(
        self, phase: Phase, token: int, text: str, tokens_in: int, seconds: float, finish: Finish, counters: Counters
    ) -> TokenRecord:
        passes = -(-tokens_in // self.prompt_chunk)
        read: dict[Tier, int] = {tier: size for tier, size in counters.used_bytes.items() if size}
        read[self.home] = read.get(self.home, 0) + self.dense_bytes * passes + self.cache.read_nbytes
        if counters.fetched["disk"]:
            read["disk"] = counters.fetched["disk"]
        self._begun = True
        meter = self._vram
        vram = 0 if meter is None else meter.used() if phase == "prefill" else meter.glance()
        return TokenRecord(
            phase=phase,
            token_id=token,
            text=text,
            tokens_in=tokens_in,
            seconds=seconds,
            by_tier=counters.by_tier,
            bytes_read=read,
            rss_bytes=resident_bytes(),
            vram_bytes=vram,
            finish=finish,
        )
