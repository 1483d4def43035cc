"""Batch: several sequences on one model, a token of each per step.

The scheduler says whose turn it is; here the steps are run, pages are found for them, and what each sequence gets is
given out. A step that fails is tried again for each of its sequences alone, so that only the one at fault fails. A
sequence that ends leaves its pages behind for one that begins alike, until somebody needs them.

Legend: V vocabulary.
"""

import time
from collections.abc import Sequence as Tokens

import torch
from torch import Tensor

from offload.batch.chunk_size import ChunkSize
from offload.batch.pages import OutOfPages
from offload.batch.prefixes import Prefix, Prefixes
from offload.batch.scheduler import Scheduler
from offload.decode.decoder import StepAbandoned
from offload.experts.cache.oom import retry_with_less_vram
from offload.generate.drafts import Drafts
from offload.generate.prompt_cache import PromptCache
from offload.generate.runner import ModelParts, Runner, Used
from offload.generate.sequence import Sequence
from offload.generate.stream import Stream
from offload.model.page_pool import PagePool
from offload.model.paged_cache import PagedCache
from offload.records import Reused, Sampling, TokenRecord
from offload.text.tokenizer import check_ids
from quant.kernels.stack import MAX_ROWS

QUEUED = "sequences waited for others to end: the KV cache had no room for all of them; --context makes room"
_LOOK_SECONDS = 0.05  # between two looks at whether a read that is waited for is still wanted


class Batch(Runner):
    """Runs sequences with pages of ``pool``. ``notes`` gets what a user should know; ``prompts`` are beginnings of
    texts on disk."""

    def __init__(
        self,
        parts: ModelParts,
        pool: PagePool,
        notes: list[str],
        prompts: PromptCache | None = None,
        drafts: Drafts | None = None,
    ) -> None:
        super().__init__(parts, drafts)
        self.pool, self.scheduler = pool, Scheduler[Sequence](pool.most_sequences)
        self.prefixes = Prefixes[PagedCache](lambda cache: cache.free())
        self.prompts = prompts
        pool.counts.forget = self._forget
        self._chunk = ChunkSize(parts.prompt_chunk)
        self._notes, self._asked, self._refused = notes, 0, -1
        self._rows: list[Sequence] = []  # of the step under way

    def limit_rows(self, most: int | None) -> int:
        """See Runner."""
        self.scheduler.max_rows = min(most or MAX_ROWS, self.scheduler.max_rows)
        return self.scheduler.max_rows

    def add(self, ids: Tokens[int], sampling: Sampling | None, stream: Stream) -> None:
        """See Runner."""
        room = self.parts.context - len(ids)
        self.scheduler.add(Sequence(self._asked, ids, sampling, stream, room))
        self._asked += 1

    @property
    def chunk_beside(self) -> int:
        """See Runner. Chunks stay long where each reads from disk what the one before did, and where their number
        changes the last bits of a sum."""
        return self._chunk.beside if self.experts.holds_all and self.decoder.same_in_chunks else self._chunk.most

    def runs_only(self, stream: Stream) -> bool:
        """See Runner."""
        return [sequence.stream for sequence in self._rows] == [stream]

    def step(self) -> bool:
        """See Runner."""
        if self.prompts is not None:
            self.prompts.collect()
        for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
            if sequence.stream.cancelled:
                self._end(sequence)
        step = self.scheduler.next(self._admit)
        if step is None or self._after_first is not None:
            self.lap = None  # neither waiting nor loading is time of a step
        if step is None:
            return bool(self.scheduler.waiting)
        try:
            self.finish_load()
        except BaseException as error:  # noqa: BLE001 - it is raised where the streams are read
            self.end_all(error)
            return False
        if step.prefill:
            self._prefill(step.rows[0])
        else:
            self._decode(step.rows)
        return True

    def prefill(self, prompt: Tokens[int]) -> TokenRecord:
        """See Runner. Others have their turns meanwhile."""
        check_ids(prompt, self.parts.known_ids())
        stream = Stream(len(prompt), lambda cancelled: None)
        self.add(prompt, None, stream)
        while not stream.ended:
            self.step()
        return next(stream)

    def reset(self) -> None:
        """See Runner."""
        self.prefixes.clear()

    @property
    def cached_tokens(self) -> int:
        """See Runner."""
        return self.prefixes.last_tokens

    def end_all(self, error: BaseException | None = None) -> None:
        """See Runner."""
        for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
            self._end(sequence, error)

    def _admit(self, sequence: Sequence) -> bool:
        """Give ``sequence`` what is kept of its beginning, if there is room for all of its tokens."""
        counts, others = self.pool.counts, self.scheduler.running
        if others and self._refused == counts.given_back:
            return False  # since then nobody has left
        cache = self._begun_alike(sequence.tokens)
        needed = cache.pages_to_come(len(sequence.tokens))
        if sequence.run:  # it has given way before: not to do so again at once
            needed += self.pool.shape.num_layers * (1 + len(others))
        if not counts.make_free(needed, self._forget) and others:
            cache.free()
            self._say_queued()
            return False
        sequence.cache = cache
        try:
            sequence.begin(self, self.drafts)
        except Exception as error:  # noqa: BLE001 - its own: it is raised where its stream is read
            self._end(sequence, error)
            return False
        self._load(sequence)
        return True

    def _forget(self) -> bool:
        """Have pages given back that nobody needs; False if there are none."""
        return self.prefixes.forget() or (self.prompts is not None and self.prompts.release()) or self.pool.spill()

    def _load(self, sequence: Sequence) -> None:
        """Begin to read what is on disk of the beginning of ``sequence``, beyond what is in memory."""
        assert sequence.cache is not None
        if self.prompts is not None:
            sequence.kept = sequence.kept or self.prompts.text()
            sequence.load = self.prompts.load(sequence.kept, sequence.tokens[:-1], sequence.cache)
        if not sequence.run:
            sequence.reused = Reused(memory=sequence.seen)

    def _loaded(self, sequence: Sequence) -> bool:
        """Whether ``sequence`` has what was read for it; where nobody else has anything to do, that is waited for."""
        load, cache = sequence.load, sequence.cache
        assert self.prompts is not None and sequence.kept is not None and load is not None and cache is not None
        if not load.wait(0 if self.scheduler.decoding else _LOOK_SECONDS):
            return False
        sequence.load = None
        if not self.prompts.finish(sequence.kept, load, cache):
            sequence.cache = self._begun_alike(sequence.tokens)
            self._load(sequence)
            return sequence.load is None
        if not sequence.run:
            sequence.reused = sequence.kept.reused
        if self.pool.disk is not None:  # as much at a time as memory has room for
            sequence.load = self.prompts.load(sequence.kept, sequence.tokens[:-1], cache)
        return sequence.load is None

    def _begun_alike(self, tokens: Tokens[int]) -> PagedCache:
        """A cache with as many of ``tokens`` but the last as any sequence has left, or has by now."""
        live = [Prefix.of(one.tokens[: one.seen], one.cache) for one in self.scheduler.running if one.cache is not None]
        for length, prefix in self.prefixes.matching(tokens[:-1], live):
            if length == len(prefix.tokens) and self.prefixes.take(prefix):
                return prefix.kept  # all of it: it goes on as this sequence
            fork = prefix.kept.fork(length)
            if fork is not None:
                self.prefixes.use(prefix)
                return fork
        return PagedCache(self.pool)

    def _prefill(self, sequence: Sequence) -> None:
        if sequence.load is not None and not self._loaded(sequence):
            return
        count = min(sequence.unseen, self.chunk_beside if self.scheduler.decoding else self.parts.prompt_chunk)
        if self.prompts is not None:
            count = min(count, self.prompts.cut(sequence.seen, count))
        end, started = sequence.seen + count, time.perf_counter()
        try:
            logits, used = self._run([sequence], [end], [[]], [1])
        except OutOfPages as error:
            self._make_room(sequence, error)
            return
        except StepAbandoned:
            return  # its stream was cancelled
        except BaseException as error:  # noqa: BLE001 - it is raised where the stream is read
            self._end(sequence, error)
            return
        self._chunk.note(count, time.perf_counter() - started)
        sequence.count(count, used)
        self._save(sequence)
        if not sequence.unseen:
            self.scheduler.prefilled()
            self._choose(sequence, logits.unbind(), [])

    def _decode(self, rows: list[Sequence], *, draft: bool = True) -> None:
        drafts = self._drafted(rows) if draft else [[] for _ in rows]
        counts = [1 + len(drafted) for drafted in drafts]
        self._keep_chunks(rows, counts)
        started = time.perf_counter()
        try:
            logits, used = self._run(rows, [len(row.tokens) for row in rows], drafts, counts)
        except OutOfPages as error:
            if any(drafts):
                self._decode(rows, draft=False)
            else:
                self._make_room(rows[-1], error)
            return
        except StepAbandoned:
            return
        except BaseException as error:  # noqa: BLE001 - it is raised where the stream is read
            if len(rows) == 1:
                self._end(rows[0], error)
            else:
                for row in rows:  # only the one at fault is to fail
                    if row.unseen:
                        self._decode([row], draft=False)
            return
        seconds, tokens = time.perf_counter() - started, 0
        after, shares = iter(logits.unbind()), used.shares(len(rows), len(rows))
        for row, drafted, count, share in zip(rows, drafts, counts, shares, strict=True):
            row.count(1, share)
            tokens += self._choose(row, [next(after) for _ in range(count)], drafted)
        if self.drafts is not None:
            self.drafts.note(len(rows), sum(counts) - len(rows), tokens, seconds, used.read)

    def _keep_chunks(self, rows: list[Sequence], counts: list[int]) -> None:
        """Where a step takes a text over the end of a chunk, what came before stays in place of what was used long ago.

        The next prompt may have this answer in other words (without its thoughts, or with its calls rendered anew), and
        so begin like this text up to a token of the chunk that is over.
        """
        for row, count in zip(rows, counts, strict=True):
            if row.cache is None or not row.cache.crosses(count):
                continue
            # A row takes a page more in each layer at most: a new one, or a copy of its last, which is shared now.
            wanted = len(rows) * self.pool.shape.num_layers
            before = row.cache.fork(row.seen) if self.pool.counts.make_free(wanted, self.prefixes.forget) else None
            if before is not None:
                row.border = self.prefixes.keep(row.tokens[: row.seen], before, row.border)

    def _drafted(self, rows: list[Sequence]) -> list[list[int]]:
        """What to try of each of ``rows`` beyond its next token."""
        if self.drafts is None:
            return [[] for _ in rows]
        return self.drafts.choose([(row.drafts, row.tokens, row.draft_room) for row in rows], MAX_ROWS - len(rows))

    def _run(
        self, rows: list[Sequence], ends: list[int], drafts: list[list[int]], keep: list[int]
    ) -> tuple[Tensor, Used]:
        """Run ``rows`` up to the token ``ends`` of each, as far as that has not been done, and its draft: the logits
        ``[Σ keep, V]`` after the last ``keep`` tokens of each, and what that took. What goes wrong leaves the sequences
        as they were, or with fewer tokens run."""
        self._rows = rows
        if self.lap is None:
            self.lap = time.perf_counter()
        try:
            # A try that failed may have cost some of the tokens before, too.
            logits = retry_with_less_vram(lambda: self._try(rows, ends, drafts, keep), self.experts)
        finally:
            with self.lock:
                self._rows = []
                self.decoder.resume()
        self.decoder.flush()
        counters = self.experts.take_counters()
        self.decoder.attend()
        kv = sum(row.cache.read_nbytes for row in rows if row.cache is not None) - self.pool.take_left_out_nbytes()
        return logits, self.used(counters, 1, max(0, kv), self.pool.take_read_nbytes())

    def _try(self, rows: list[Sequence], ends: list[int], drafts: list[list[int]], keep: list[int]) -> Tensor:
        caches = [row.cache for row in rows if row.cache is not None]
        before = [cache.get_seq_length() for cache in caches]
        ids = [
            [*row.tokens[seen:end], *draft] for row, seen, end, draft in zip(rows, before, ends, drafts, strict=True)
        ]
        try:
            with torch.inference_mode():
                if [len(of_row) for of_row in ids] == keep:
                    logits = self.decoder.forward_rows(list(zip(ids, caches, strict=True)))
                else:  # a chunk of a prompt, or what a failure has cost
                    parts = zip(ids, caches, keep, strict=True)
                    logits = torch.cat([self.decoder.forward(new, cache, keep=kept) for new, cache, kept in parts])
            self.experts.check_files()
            return logits
        except BaseException:  # some layers, or some caches, have got the tokens, others not
            for cache, length in zip(caches, before, strict=True):
                cache.rewind(length)
            raise

    def _choose(self, sequence: Sequence, logits: Tokens[Tensor], draft: Tokens[int]) -> int:
        """Give ``sequence`` what follows by ``logits``, and return how many tokens that is. Of ``draft``, which was
        run, only what was chosen stays."""
        try:
            count, finished = sequence.choose(logits, draft, self)
        except BaseException as error:  # noqa: BLE001 - it is raised where the stream is read
            sequence.take_back()
            self._end(sequence, error)
            return 0
        sequence.take_back()
        self._save(sequence)
        if finished:
            self._end(sequence)
        return count

    def _save(self, sequence: Sequence) -> None:
        if self.prompts is not None and sequence.kept is not None and sequence.cache is not None:
            self.prompts.save(sequence.kept, sequence.tokens, sequence.cache)

    def _make_room(self, sequence: Sequence, error: OutOfPages) -> None:
        """One sequence gives its pages up and waits, so that the others go on; ``sequence`` fails if it is alone."""
        stopped = self.scheduler.preempt()
        if stopped is None:
            self._end(sequence, error)
            return
        assert stopped.cache is not None
        stopped.stop_loading()
        stopped.cache.free()
        self._say_queued()

    def _say_queued(self) -> None:
        self._refused = self.pool.counts.given_back
        if QUEUED not in self._notes:
            self._notes.append(QUEUED)

    def _end(self, sequence: Sequence, error: BaseException | None = None) -> None:
        """``sequence`` is over; what has been run of it stays for others that begin alike."""
        self.scheduler.remove(sequence)
        sequence.close()
        if sequence.cache is not None:
            self.prefixes.keep(sequence.tokens[: sequence.seen], sequence.cache)
        if sequence.run:
            self.runs.append(sequence.run)
        sequence.stream.end(error)
