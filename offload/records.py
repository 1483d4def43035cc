"""The one stream of records that chat, bench, reports and tests consume, and the settings that start a
run."""

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from offload.tiers import Tier
from quant.errors import UsageError
from quant.model.recipe import RUN_DEFAULTS, Recipe
from quant.sizes import as_bytes

Finish = Literal["", "eos", "stop", "length", "context", "cancelled"]
FinishReason = Literal["stop", "length", "context"]
_LONGEST = 2**31 - 1  # tokens are counted in 32 bits here and there
_KV, _DEVICES, _DRAFTS = ("bf16", "int8"), ("auto", "cpu", "cuda"), (None, "ngram")
Given = TypeVar("Given")
Kept = TypeVar("Kept")


class Converted(Generic[Given, Kept]):
    """A field of a frozen dataclass that takes what a person writes and is kept as ``convert`` makes it."""

    def __init__(self, convert: Callable[[Given], Kept], default: Kept) -> None:
        self._convert, self._default = convert, default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type) -> Kept:
        return self._default if instance is None else instance.__dict__[self._name]

    def __set__(self, instance: Any, value: Given) -> None:
        instance.__dict__[self._name] = self._convert(value)


def _bytes(size: int | str | None) -> int | None:
    return None if size is None else as_bytes(size)


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


def _stops(texts: str | Iterable[str]) -> tuple[str, ...]:
    return (texts,) if isinstance(texts, str) else tuple(texts)


@dataclass(frozen=True)
class RunOptions:
    """What the user asked of a run; None means: as much as the machine and the model allow.

    ``vram`` and ``ram`` are budgets in bytes or as people write them ("64GiB"), ``context`` the tokens that a
    sequence may have (None: see ModelShape.context), ``sequences`` how many of that length the KV cache has pages for:
    any number share these, and take them as they come to them; ``kv`` how it is stored (None: bf16), ``routing`` the
    path of a routing profile, ``prompt_chunk`` the prompt tokens run through the model at once. ``exact`` keeps
    activations in floating point on the CPU (the native kernels otherwise quantize them to int8 per group).
    ``page_cache`` reads experts through the operating system's page cache instead of direct I/O. ``graph``
    decodes on a GPU without a wait for the host in every layer; two things beside it are unproven,
    no run on a card has shown their worth: up to ``prefetch_bytes`` of a coming miss are read into the CPU's
    caches (None: half of their size, 0: none), and with ``regain`` VRAM that was given up for another program
    is taken again once that has left it. ``images`` keeps room to look at pictures, if the model can.
    ``prompt_cache`` is a folder in which what is computed of prompts is kept for later runs, at most
    ``prompt_cache_size`` bytes of it (None: 50 GiB).
    ``draft`` tries tokens that the text itself suggests, where that pays; ``draft_model`` those that a second, smaller
    model of the same tokenizer does, a directory or a Hub id. ``kv_disk`` is a folder in which the older part of the
    KV cache is while it has no room in RAM, of which ``kv_ram`` bytes are for it (None: what experts leave). Pages of
    it that are proved to have no more than a share of ``kv_epsilon`` of any softmax, all together, are not read to
    decode a token (0: everything is).
    """

    vram: Converted[int | str | None, int | None] = Converted(_bytes, None)
    ram: Converted[int | str | None, int | None] = Converted(_bytes, None)
    context: int | None = None
    kv: Literal["bf16", "int8"] | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    policy: str | None = None
    routing: Converted[str | Path | None, Path | None] = Converted(_path, None)
    prompt_chunk: int | None = None
    exact: bool = False
    page_cache: bool = False
    threads: int | None = None
    graph: bool = True
    prefetch_bytes: Converted[int | str | None, int | None] = Converted(_bytes, None)
    regain: bool = False
    images: bool = False
    prompt_cache: Converted[str | Path | None, Path | None] = Converted(_path, None)
    prompt_cache_size: Converted[int | str | None, int | None] = Converted(_bytes, None)
    draft: Literal["ngram"] | None = None
    draft_model: Converted[str | Path | None, Path | None] = Converted(_path, None)
    sequences: int = 1
    kv_disk: Converted[str | Path | None, Path | None] = Converted(_path, None)
    kv_ram: Converted[int | str | None, int | None] = Converted(_bytes, None)
    kv_epsilon: float = 0.0

    def __post_init__(self) -> None:
        choices = (("kv", self.kv, (None, *_KV)), ("device", self.device, _DEVICES), ("draft", self.draft, _DRAFTS))
        for name, value, known in choices:
            if value not in known:
                raise UsageError(f"{name} is {value!r}: expected {' or '.join(repr(one) for one in known if one)}")
        if self.context is not None and not 1 <= self.context <= _LONGEST:
            raise UsageError(f"the context is {self.context} tokens: expected 1 to {_LONGEST:,}")
        if self.sequences < 1:
            raise UsageError(f"sequences is {self.sequences}: expected at least 1")
        if self.draft is not None and self.draft_model is not None:
            raise UsageError("two kinds of drafts were asked for: expected --draft or --draft-model")
        if self.prompt_cache_size is not None and self.prompt_cache is None:
            raise UsageError("a size of the prompt cache was given and no folder: give --prompt-cache, too")
        if not 0 <= self.kv_epsilon < 1:  # NaN, too
            raise UsageError(f"kv_epsilon is {self.kv_epsilon}: expected a share from 0 (all is read) to below 1")
        if self.kv_ram is not None and self.kv_disk is None:
            raise UsageError("a size of the KV cache in RAM was given and no folder for the rest: give --kv-disk, too")

    def over(self, recipe: Recipe | None) -> "RunOptions":
        """These options, and what ``recipe`` says where nothing was asked."""
        if recipe is None:
            return self
        return replace(self, **{name: getattr(recipe, name) for name in RUN_DEFAULTS if getattr(self, name) is None})


@dataclass(frozen=True)
class LeftOut:
    """What decode steps with an ``epsilon`` read: of ``pages`` that they could see, counted for each KV head and token,
    ``left_out`` were not, ``left_out_bytes`` of keys and values. ``greatest_share`` is the most that those of one token
    can have had of any head's softmax."""

    epsilon: float
    pages: int
    left_out: int
    left_out_bytes: int
    greatest_share: float


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. ``temperature`` 0 is greedy; None switches a filter off. The text ends
    before any of ``stop``, and at the model's end-of-text token unless ``ignore_eos``.

    ``repetition_penalty`` divides the logits of what prompt and answer have; ``frequency_penalty`` is taken off
    those of the answer's tokens once for each time they came, ``presence_penalty`` once. ``logit_bias`` adds to the
    logits of tokens. ``grammar`` is one of llguidance: tokens that would break it are never chosen, and the text may
    end only where it is complete. With ``logprobs`` records carry log probabilities, those of so many of the likeliest
    tokens among them. ``special_tokens`` shows special tokens in the text. ``drafts``: where the session drafts, for
    this text, too; that changes its speed alone.

    Raises UsageError for a value that cannot be.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: Converted[str | Iterable[str], tuple[str, ...]] = Converted(_stops, ())
    ignore_eos: bool = False
    grammar: str | None = None
    logprobs: int | None = None
    special_tokens: bool = False
    drafts: bool = True

    def __post_init__(self) -> None:
        for name, (low, high, expected) in _SAMPLING_RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # NaN, too
                raise UsageError(f"{name} is {value}: expected {expected}")
        for token, bias in self.logit_bias.items():
            if token < 0 or not -100 <= bias <= 100:
                raise UsageError(
                    f"logit_bias of token {token} is {bias}: expected a number from -100 to 100 for a token's id"
                )
        if self.grammar is not None and self.ignore_eos:
            raise UsageError("grammar and ignore_eos contradict each other: a text ends where its grammar does")


_SAMPLING_RANGES: dict[str, tuple[float, float, str]] = {
    "max_tokens": (1, math.inf, "at least 1"),
    "temperature": (0, sys.float_info.max, "0 for greedy, or a number above it"),
    "top_k": (1, math.inf, "at least 1"),
    "top_p": (math.ulp(0.0), 1, "a number above 0, at most 1"),
    "min_p": (0, 1, "a number from 0 to 1"),
    "repetition_penalty": (0.01, 100, "a number from 0.01 to 100, 1 for none"),
    "presence_penalty": (-2, 2, "a number from -2 to 2"),
    "frequency_penalty": (-2, 2, "a number from -2 to 2"),
    "logprobs": (0, 20, "a whole number from 0 to 20"),
    "seed": (0, 2**64 - 1, "a whole number from 0 to 18446744073709551615 (64 bits)"),
}


@dataclass(frozen=True)
class Logprobs:
    """How likely the model itself took a token for, whatever the sampling made of that: natural logarithms of
    probabilities. ``top`` are the likeliest tokens and theirs, the likeliest first."""

    chosen: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Reused:
    """Tokens of a prompt that were not computed: ``memory`` of them were in the KV cache, ``disk`` were read from the
    prompt cache, ``disk_bytes`` of it in ``disk_seconds``."""

    memory: int = 0
    disk: int = 0
    disk_bytes: int = 0
    disk_seconds: float = 0.0

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.memory + self.disk

    def __add__(self, other: "Reused") -> "Reused":
        return Reused(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class TokenRecord:
    """One step of generation: a prefill that ends in the first token, or one decode step.

    ``tokens_in`` counts the tokens run through the model in this step and ``seconds`` its wall time.
    ``by_tier`` counts (layer, expert) requests by the tier that held the expert when it was asked for;
    ``bytes_read`` the bytes the step read from each tier: dense weights, experts and KV cache from "ram" (or
    "vram"), expert fetches from "disk". ``text`` is what became printable. ``finish`` is set on the last
    record: "eos" and "stop" for a token or a text that ends it, "length" after ``max_tokens``, "context" when
    the KV cache is full before that. ``stop`` is the stop string that was met. Where ``sequences`` ran in the step, the
    counts are this one's share of it: all shares add up to what was asked for and read. So is ``own_seconds`` of the
    time that its steps took, while ``seconds`` is what its reader waited, turns of others among it (0: the same).
    ``reused`` are tokens before those of a prefill that were there already. A step that was tried with ``drafted``
    tokens more (said on its first record) may give several; ``place`` says which this one is.
    """

    phase: Literal["prefill", "decode"]
    token_id: int
    text: str
    tokens_in: int
    seconds: float
    by_tier: Mapping[Tier, int] = field(default_factory=dict)
    bytes_read: Mapping[Tier, int] = field(default_factory=dict)
    rss_bytes: int = 0
    vram_bytes: int = 0
    finish: Finish = ""
    stop: str = ""
    logprobs: Logprobs | None = None
    sequences: int = 1
    reused: Reused = Reused()
    drafted: int = 0
    place: int = 0
    own_seconds: float = 0.0

    @property
    def busy_seconds(self) -> float:
        """What the model was at work for it: of all records of a run these add up to the time that passed."""
        return self.own_seconds or self.seconds

    @property
    def hits(self) -> int:
        """Expert requests that found the expert in VRAM or RAM."""
        return self.by_tier.get("vram", 0) + self.by_tier.get("ram", 0)

    @property
    def misses(self) -> int:
        """Expert requests that had to read the disk."""
        return self.by_tier.get("disk", 0)

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the text ends here, as servers call it; None where it goes on or was broken off."""
        reasons: dict[Finish, FinishReason] = {"eos": "stop", "stop": "stop", "length": "length", "context": "context"}
        return reasons.get(self.finish)
