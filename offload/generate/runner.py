"""Runner: what all ways to run a model's steps have in common; each runs the sequences that it is given step by step.

Legend: V vocabulary.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from offload.decode.decoder import Decoder
from offload.experts.cache.expert_cache import Counters, ExpertCache
from offload.generate.drafts import Drafts
from offload.generate.grammar import Grammars
from offload.generate.stream import Stream
from offload.hardware.ledger import resident_bytes
from offload.hardware.vram_limit import VramMeter
from offload.model.kv_cache import remedy
from offload.records import Finish, Logprobs, Sampling, TokenRecord
from offload.text.own_tokens import OwnTokens
from offload.text.tokenizer import check_ids
from offload.tiers import Tier
from quant.checkpoint.checkpoint import Checkpoint
from quant.errors import BudgetError, UsageError
from quant.model.config import stated_ends
from quant.model.generation_config import read_generation_config, token_ids

Phase = Literal["prefill", "decode"]
_KEPT_RUNS = 16
_RSS_S = 0.05  # resident memory is asked for so often: for every token of a small model it would cost a tenth of it


@dataclass(frozen=True)
class ModelParts:
    """What runs a model's tokens and counts them. ``dense_bytes`` is what every forward pass reads besides experts from
    ``home``, where dense weights and KV cache are; ``context`` tokens are planned for, and the model was made for
    ``limit`` (0: not known). ``known_ids`` tells below which number token ids are known: images add to them.

    ``own`` has the tokens of answers for the prompts that go on from them.

    ``after_first`` is called once, when the first token has been given out and another is asked for: it does what would
    only delay that token.
    """

    decoder: Decoder
    tokenizer: Any
    experts: ExpertCache
    dense_bytes: int
    prompt_chunk: int
    context: int
    limit: int
    vocab_size: int
    known_ids: Callable[[], int]
    eos: frozenset[int]
    home: Tier
    own: OwnTokens
    vram: VramMeter | None = None
    after_first: Callable[[], None] | None = None


def end_tokens(checkpoint: Checkpoint, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text, by the first that names any: generation_config.json, config.json, tokenizer."""
    ends = read_generation_config(checkpoint.path).ends or token_ids(stated_ends(checkpoint.config))
    return ends or token_ids(tokenizer.eos_token_id)


@dataclass
class Used:
    """What some steps, or a sequence's part of them, took: requests for experts by tier, bytes read by tier, how many
    sequences were in the step, and ``seconds`` of the model's time."""

    by_tier: dict[Tier, int] = field(default_factory=dict)
    read: dict[Tier, int] = field(default_factory=dict)
    rows: int = 1
    seconds: float = 0.0

    def add(self, other: "Used") -> None:
        """``other`` took place, too."""
        for mine, theirs in ((self.by_tier, other.by_tier), (self.read, other.read)):
            if mine:
                theirs = {tier: mine.get(tier, 0) + count for tier, count in theirs.items()}
            mine.update(theirs)
        self.rows = other.rows
        self.seconds += other.seconds

    def shares(self, count: int, rows: int | None = None) -> "list[Used]":
        """``count`` parts that add up to the whole, of a step with ``rows`` sequences (None: as many as before)."""
        rows, seconds = self.rows if rows is None else rows, self.seconds / count
        parts = zip(_shares(self.by_tier, count), _shares(self.read, count), strict=True)
        return [Used(by_tier, read, rows, seconds) for by_tier, read in parts]


def _shares(whole: dict[Tier, int], count: int) -> list[dict[Tier, int]]:
    if count == 1:
        return [whole.copy()]
    ends = [(tier, [amount * i // count for i in range(count + 1)]) for tier, amount in whole.items()]
    return [{tier: at[i + 1] - at[i] for tier, at in ends} for i in range(count)]


class Chosen(NamedTuple):
    """A token, the text that became certain with it, why the text ends there, if it does, and by which stop string."""

    token: int
    text: str = ""
    finish: Finish = ""
    stop: str = ""
    logprobs: Logprobs | None = None


class Runner:
    """Runs sequences with ``parts``, and what ``drafts`` makes of them. ``runs`` are the records of the latest."""

    def __init__(self, parts: ModelParts, drafts: Drafts | None = None) -> None:
        self.parts, self.decoder, self.experts = parts, parts.decoder, parts.experts
        self.eos, self.drafts = parts.eos, drafts
        self.grammars = Grammars(parts.tokenizer, parts.vocab_size, parts.eos)
        self.runs: deque[list[TokenRecord]] = deque(maxlen=_KEPT_RUNS)
        self._after_first, self._begun = parts.after_first, False
        self._resident, self._resident_at = 0, 0.0
        self.lap: float | None = None  # since when the model is at work for the next step, where turns are taken
        self.lock = threading.Lock()  # held while it changes for whom a step runs

    def check(self, prompt: Sequence[int], sampling: Sampling) -> int:
        """How many tokens may follow ``prompt``.

        Raises UsageError for an empty prompt, CheckpointError for a token that the model does not know and
        BudgetError for a prompt that does not fit the planned context.
        """
        if not prompt:
            raise UsageError("the prompt is empty: expected at least one token")
        check_ids(prompt, self.parts.known_ids())
        context = self.parts.context
        room = context - len(prompt)
        if room < 1:
            what = remedy(self.parts.limit, len(prompt) + 1, len(prompt) + sampling.max_tokens)
            raise BudgetError(
                f"the prompt has {len(prompt):,} tokens and the KV cache is planned for {context:,}: {what}"
            )
        return room

    def limit_rows(self, most: int | None) -> int:
        """Run ``most`` sequences at once, or as many as can be; how many that is."""
        return 1

    @property
    def chunk_beside(self) -> int:
        """Tokens of a prompt that are run at once while others wait for their next token."""
        return self.parts.prompt_chunk

    def add(self, ids: Sequence[int], sampling: Sampling, stream: Stream) -> None:
        """Let a prompt that was checked wait for its turn; ``stream`` is told what becomes of it."""
        raise NotImplementedError

    def step(self) -> bool:
        """Run a step for whoever's turn it is; False if there is nothing to do."""
        raise NotImplementedError

    def runs_only(self, stream: Stream) -> bool:
        """Whether the step under way is for nobody but ``stream``, asked by a thread that holds ``lock``."""
        raise NotImplementedError

    def prefill(self, prompt: Sequence[int]) -> TokenRecord:
        """Run ``prompt`` through the model without choosing a token; the record's ``token_id`` is -1."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget the sequences that are over."""
        raise NotImplementedError

    @property
    def cached_tokens(self) -> int:
        """Tokens that are kept of the sequence that ran last."""
        raise NotImplementedError

    def end_all(self, error: BaseException | None = None) -> None:
        """End every sequence, because of ``error`` if there is one."""
        raise NotImplementedError

    def finish_load(self, *, now: bool = False) -> None:
        """Do what was put off until after the first token, if that has been or ``now``."""
        if self._after_first is not None and (self._begun or now):
            self._after_first()
            self._after_first = None

    def used(self, counters: Counters, passes: int, kv_bytes: int, kv_disk_bytes: int = 0) -> Used:
        """What ``passes`` through the model took that ``counters`` counted and read ``kv_bytes`` of keys and values,
        ``kv_disk_bytes`` of them from disk; with a ``lap``, all time since it began, when the next one does."""
        read: dict[Tier, int] = {tier: size for tier, size in counters.used_bytes.items() if size}
        read[self.parts.home] = read.get(self.parts.home, 0) + self.parts.dense_bytes * passes + kv_bytes
        if counters.fetched["disk"] or kv_disk_bytes:
            read["disk"] = counters.fetched["disk"] + kv_disk_bytes
        before, now = self.lap, time.perf_counter()
        if before is not None:
            self.lap = now
        return Used(dict(counters.by_tier), read, seconds=now - before if before is not None else 0.0)

    def record(
        self, phase: Phase, chosen: Chosen, tokens_in: int, seconds: float, used: Used, drafted: int, place: int
    ) -> TokenRecord:
        """The record of a step, of a sequence's part of one, or of one of the tokens that it gave."""
        self._begun = True
        meter, now = self.parts.vram, time.perf_counter()
        if now - self._resident_at > _RSS_S:
            self._resident, self._resident_at = resident_bytes(), now
        vram = 0 if meter is None else meter.used() if phase == "prefill" else meter.glance()
        return TokenRecord(
            phase=phase,
            token_id=chosen.token,
            text=chosen.text,
            tokens_in=tokens_in,
            seconds=seconds,
            by_tier=used.by_tier,
            bytes_read=used.read,
            rss_bytes=self._resident,
            vram_bytes=vram,
            finish=chosen.finish,
            stop=chosen.stop,
            logprobs=chosen.logprobs,
            sequences=used.rows,
            drafted=drafted,
            place=place,
            own_seconds=used.seconds,
        )
