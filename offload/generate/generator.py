"""Generator: one sequence at a time, for decoders whose steps are bound to one KV cache.

The KV cache outlives a call. A prompt is always the whole conversation; what the cache already holds of it is
not run again. A step that is interrupted leaves the cache as it was before the step.

A decoder that can begins a token's step as soon as the token is known: its record, its text and whatever the
caller does with them take their time while the step runs. A step that nobody comes back for is dropped.
"""

import collections.abc
import time
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from offload.batch.token_ids import common, frozen, packed_ids
from offload.decode.decoder import StepAbandoned
from offload.experts.cache.expert_cache import Counters
from offload.experts.cache.oom import retry_with_less_vram
from offload.generate.answer import Answer
from offload.generate.drafts import Drafts, TextDrafts
from offload.generate.runner import Chosen, ModelParts, Phase, Runner
from offload.generate.stream import Stream
from offload.model.kv_cache import SequenceCache
from offload.records import Reused, Sampling, TokenRecord
from offload.text.tokenizer import check_ids
from quant.errors import UsageError

_MOST_DRAFTED = 7  # of a step
Records = collections.abc.Generator[TokenRecord, None, None]


class Generator(Runner):
    """Runs sequences one after the other through ``cache``. ``notes`` gets what a user should know."""

    def __init__(self, parts: ModelParts, cache: SequenceCache, notes: list[str], drafts: Drafts | None = None) -> None:
        super().__init__(parts, drafts)
        self._notes = notes
        self.cache, self.prompt_chunk = cache, parts.prompt_chunk
        self.tokens = packed_ids(())  # what the cache holds
        self._turn = 0  # counts who may go on: a later call ends an earlier one
        self._waiting: deque[tuple[Sequence[int], Sampling, Stream]] = deque()
        self._running: tuple[Records, Stream] | None = None

    def add(self, ids: Sequence[int], sampling: Sampling, stream: Stream) -> None:
        """See Runner."""
        self._waiting.append((ids, sampling, stream))
        note = "sequences took turns, each to its end: beside a GPU a step holds one, so others wait for it"
        if note not in self._notes and (self._running is not None or len(self._waiting) > 1):
            self._notes.append(note)

    def runs_only(self, stream: Stream) -> bool:
        """See Runner."""
        return self._running is not None and self._running[1] is stream

    def step(self) -> bool:
        """See Runner."""
        if self._running is None:
            if not self._waiting:
                return False
            ids, sampling, stream = self._waiting.popleft()
            self._running = self.generate(ids, sampling), stream
        records, stream = self._running
        error: BaseException | None = None
        try:
            record = None if stream.cancelled else next(records, None)
        except StepAbandoned:
            record = None
        except BaseException as raised:  # noqa: BLE001 - it is raised where the stream is read
            record, error = None, raised
        if record is None:
            records.close()
            with self.lock:
                self._running = None
                self.decoder.resume()
            stream.end(error)
            return True
        if record.phase == "prefill":
            stream.cached_tokens = record.reused.tokens
        stream.push(record)
        return True

    def end_all(self, error: BaseException | None = None) -> None:
        """See Runner."""
        if self._running is not None:
            self._running[0].close()
            self._running[1].end(error)
            self._running = None
        while self._waiting:
            self._waiting.popleft()[2].end(error)

    @property
    def cached_tokens(self) -> int:
        """See Runner."""
        return len(self.tokens)

    def reset(self) -> None:
        """Forget the sequence."""
        self._take_turn()
        self.cache.reset()  # type: ignore[no-untyped-call]
        self.tokens = packed_ids(())

    def generate(self, prompt: Sequence[int], sampling: Sampling) -> Records:
        """Yield the prefill's record and then one per decoded token; raises what ``check`` does."""
        room = self.check(prompt, sampling)
        turn = self._take_turn()
        try:
            yield from self._steps(packed_ids(prompt), sampling, room, turn)
        finally:
            if turn == self._turn:
                self.decoder.drop()

    def _steps(self, context: "array[int]", sampling: Sampling, room: int, turn: int) -> Iterator[TokenRecord]:
        self.finish_load()
        answer = Answer(context, sampling, self, room)
        drafts = self._drafts(sampling)
        try:
            yield from self._decode(context, answer, drafts, turn)
        finally:
            answer.close()
            if drafts is not None:
                drafts.close()

    def _decode(
        self, context: "array[int]", answer: Answer, drafts: TextDrafts | None, turn: int
    ) -> Iterator[TokenRecord]:
        run: list[TokenRecord] = []
        self.runs.append(run)
        started = time.perf_counter()
        step_ids: Sequence[int] = self._unseen(context)
        draft: list[int] = []
        logits = self._prefill(step_ids)
        while True:
            chosen = answer.choose(logits.unbind(), draft)
            known = time.perf_counter()
            if drafts is not None:
                drafts.learn([one.token for one in chosen])
            self._take_back(len(context) - 1)
            tried = len(draft)
            draft = [] if chosen[-1].finish else self._drafted(drafts, answer)
            launched, counters = self._go_on(None if chosen[-1].finish or draft else context[-1])
            chosen = answer.tell(chosen)
            finish = chosen[-1].finish
            if finish:
                self.decoder.drop()  # a stop string was met: nobody wants the next token
                self._take_back(len(context) - 1)
            seconds = (known if launched else time.perf_counter()) - started
            phase: Phase = "decode" if run else "prefill"
            passes = 1 if run else -(-len(step_ids) // self.prompt_chunk)
            used = self.used(counters, passes, self.cache.read_nbytes)
            if self.drafts is not None and run:  # what a rejection has cost beside its step is drafts' cost, too
                self.drafts.note(1, len(step_ids) - 1, len(chosen), known - started, used.read)
            tokens_in = 1 if run else len(step_ids)
            records = [
                self.record(phase, one, tokens_in, seconds / len(chosen), share, 0 if place else tried, place)
                for place, (one, share) in enumerate(zip(chosen, used.shares(len(chosen)), strict=True))
            ]
            if not run:
                records[0] = replace(records[0], reused=Reused(len(context) - 1 - len(step_ids)))
            given = time.perf_counter()
            for record in records:
                run.append(record)
                yield record
            asked = time.perf_counter()
            if finish:
                return
            if turn != self._turn:
                raise UsageError("another generation has begun on this model: this one cannot go on")
            self.finish_load()
            started = known if launched else time.perf_counter()
            if draft:
                self.cache.bookmark()
            step_ids = [*context[len(self.tokens) :], *draft]
            logits = self._forward(step_ids, 1 + len(draft))
            if launched:  # time that the caller took is the step's as far as it ran meanwhile
                started += max(0.0, asked - max(given, self.decoder.ended_at))

    def _drafts(self, sampling: Sampling) -> TextDrafts | None:
        if self.drafts is None or not sampling.drafts:
            return None
        if self.decoder.continues:
            return self.drafts.begin()
        note = "no drafts: this model's own modules run one token after the other once a text has begun"
        if note not in self._notes:
            self._notes.append(note)
        return None

    def _drafted(self, drafts: TextDrafts | None, answer: Answer) -> list[int]:
        """What to try beyond the next token, as far as it can be taken back."""
        if self.drafts is None or drafts is None:
            return []
        room = 0 if len(self.tokens) < len(answer.tokens) - 1 else min(answer.room, self.cache.reversible) - 1
        return self.drafts.choose([(drafts, answer.tokens, max(room, 0))], _MOST_DRAFTED)[0]

    def _take_back(self, length: int) -> None:
        """Forget what was run beyond ``length`` tokens; a cache that cannot go back forgets more."""
        if len(self.tokens) > length:
            del self.tokens[self.cache.rewind(length) :]

    def prefill(self, prompt: Sequence[int]) -> TokenRecord:
        """Run ``prompt`` through the model without choosing a token; the record's ``token_id`` is -1."""
        check_ids(prompt, self.parts.known_ids())
        self._take_turn()
        self.finish_load()
        started = time.perf_counter()
        ids = self._unseen(packed_ids(prompt))
        self._prefill(ids)
        _, counters = self._go_on(None)
        used = self.used(counters, -(-len(ids) // self.prompt_chunk), self.cache.read_nbytes)
        record = self.record("prefill", Chosen(-1), len(ids), time.perf_counter() - started, used, 0, 0)
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

    def _unseen(self, prompt: "array[int]") -> "array[int]":
        """The part of ``prompt`` that the cache does not hold, at least its last token; the rest is kept."""
        kept = self.cache.rewind(common(frozen(self.tokens), frozen(prompt[:-1])))
        del self.tokens[kept:]
        return prompt[kept:]

    def _prefill(self, ids: Sequence[int]) -> Tensor:
        logits = torch.empty(0)
        for start in range(0, len(ids), self.prompt_chunk):
            logits = self._forward(ids[start : start + self.prompt_chunk])
        return logits

    def _forward(self, ids: Sequence[int], keep: int = 1) -> Tensor:
        """Run ``ids`` and return the logits ``[keep, vocab]`` of the last ``keep``. Raises MachineError if the GPU
        fails or has no memory left."""
        before, count = self.tokens, len(self.tokens)
        # A try that failed may have cost some of the tokens before, too.
        return retry_with_less_vram(lambda: self._try([*before[len(self.tokens) : count], *ids], keep), self.experts)

    def _try(self, ids: Sequence[int], keep: int) -> Tensor:
        before = len(self.tokens)
        try:
            with torch.inference_mode():
                logits = self.decoder.forward(ids, self.cache, keep=keep)
            self.experts.check_files()
        except BaseException:  # KeyboardInterrupt too: some layers have seen the tokens, others not
            self.tokens = self.tokens[: self.cache.rewind(before)]  # a copy: another try needs what was there
            raise
        self.tokens.extend(ids)
        return logits
