"""Service: one loaded model, and the answers that clients of every dialect get from it."""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import TYPE_CHECKING, Any

from cli.serve.errors import ServeError, as_serve_error
from cli.serve.metrics import Metrics
from cli.serve.parts import Parser, Part
from offload.records import Sampling, TokenRecord

if TYPE_CHECKING:  # they import torch
    from offload.generate.stream import Stream
    from offload.run.session import Session

RETRY_SECONDS = 2


@dataclass(frozen=True)
class Limits:
    """What clients may use: answers at once and waiting, bytes of a body, characters of a JSON schema, choices of
    one request."""

    parallel: int = 1
    queue: int = 32
    body_bytes: int = 32 << 20
    schema_bytes: int = 64 << 10
    choices: int = 16


@dataclass(frozen=True)
class Request:
    """What a request of any dialect comes to: token ids of prompts, ``n`` answers to each, and what takes the text of
    an answer apart. The answers are numbered prompt by prompt."""

    prompts: Sequence[Sequence[int]]
    sampling: Sampling
    parser: Callable[[], Parser]
    n: int = 1

    @property
    def choices(self) -> int:
        """Answers in all."""
        return len(self.prompts) * self.n


@dataclass
class Usage:
    """Tokens of a request, and the seconds that they took."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    reasoning: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decoded: int = 0

    def add(self, record: TokenRecord, *, reasoning: bool) -> None:
        """One more token."""
        self.completion += 1
        self.reasoning += reasoning
        if record.phase == "prefill":
            self.prefill_seconds += record.seconds
        else:
            self.decode_seconds += record.seconds
            self.decoded += 1

    def timings(self) -> dict[str, float]:
        """As llama.cpp's server tells them."""
        computed = self.prompt - self.cached
        prompt_ms, predicted_ms = 1e3 * self.prefill_seconds, 1e3 * self.decode_seconds
        return {
            "cache_n": self.cached,
            "prompt_n": computed,
            "prompt_ms": prompt_ms,
            "prompt_per_second": computed / self.prefill_seconds if self.prefill_seconds else 0.0,
            "predicted_n": self.completion,
            "predicted_ms": predicted_ms,
            "predicted_per_token_ms": predicted_ms / self.decoded if self.decoded else 0.0,
            "predicted_per_second": self.decoded / self.decode_seconds if self.decode_seconds else 0.0,
        }


@dataclass(frozen=True)
class Step:
    """What one token added to answer ``choice``; the last of an answer has a ``finish``."""

    choice: int
    parts: Sequence[Part]
    record: TokenRecord
    finish: str = ""


@dataclass
class Slot:
    """An answer under way, as /slots tells of it."""

    stream: "Stream"
    started: float = field(default_factory=time.monotonic)
    tokens: int = 0


class Answers:
    """The answers to one request. Iterate over ``steps``; whoever stops doing that calls ``close``."""

    def __init__(self, streams: "Sequence[Stream]", request: Request, slots: dict[int, Slot], metrics: Metrics) -> None:
        self.request, self.usage = request, Usage()
        self.open = set(range(len(streams)))  # answers that are not finished
        self._streams, self._slots, self._metrics = streams, slots, metrics
        self._queue: asyncio.Queue[tuple[int, TokenRecord | Exception | None]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._started = time.monotonic()
        for stream in streams:
            self._slots[id(stream)] = Slot(stream)
        try:
            for choice, stream in enumerate(streams):
                threading.Thread(target=self._pump, args=(choice, stream), name="answer", daemon=True).start()
        except RuntimeError as error:
            self.close()
            raise ServeError(503, "the system starts no more threads: try again later, or raise `ulimit -u`") from error

    def _pump(self, choice: int, stream: "Stream") -> None:
        end: Exception | None = None
        try:
            for record in stream:
                self._tell(choice, record)
        except Exception as error:  # noqa: BLE001 - it is raised where the answer is read
            end = error
        self._tell(choice, end)

    def _tell(self, choice: int, said: TokenRecord | Exception | None) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (choice, said))

    async def steps(self) -> AsyncGenerator[Step, None]:
        """Every token of every answer. Raises ServeError."""
        parsers = [self.request.parser() for _ in self._streams]
        self.usage.prompt = sum(stream.prompt_tokens for stream in self._streams[:: self.request.n])
        try:
            while self.open:
                choice, said = await self._queue.get()
                if isinstance(said, Exception):
                    raise as_serve_error(said) from said
                if said is None:  # every answer has a finish before, unless its stream was ended from elsewhere
                    if choice in self.open:
                        raise ServeError(503, "the server is shutting down")
                    continue
                stream, parser = self._streams[choice], parsers[choice]
                parts = [*parser.feed(said.text), *(parser.finish() if said.finish else ())]
                self.usage.add(said, reasoning=parser.reasoning)
                self._slots[id(stream)].tokens += 1
                if said.phase == "prefill":
                    self.usage.cached += stream.cached_tokens if choice % self.request.n == 0 else 0
                    self._metrics.prefilled(said, stream.cached_tokens, time.monotonic() - self._started)
                else:
                    self._metrics.decoded(said)
                if said.finish:
                    self.open.discard(choice)
                    self._slots.pop(id(stream), None)
                    self._metrics.finished(said.finish)
                yield Step(choice, parts, said, said.finish)
        finally:
            self.close()

    def close(self) -> None:
        """Cancel what is not finished, within a step."""
        for stream in self._streams:
            if self._slots.pop(id(stream), None) is not None:
                stream.cancel()
                self._metrics.finished("cancelled")


class Service:
    """What the dialects share: the model, its name, its defaults, and how much clients may ask for."""

    def __init__(self, session: "Session", name: str, defaults: Sampling, limits: Limits) -> None:
        self.session, self.name, self.defaults, self.limits = session, name, defaults, limits
        self.slots: dict[int, Slot] = {}
        self.metrics = Metrics(self.gauges)
        self.started = int(time.time())
        self.version = metadata.version("coldstream")

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.session.context

    def gauges(self) -> list[tuple[str, str, float]]:
        """What is so now, for Metrics."""
        active, parallel = len(self.slots), self.limits.parallel
        return [
            ("sequences_running", "Answers that are generated now", min(active, parallel)),
            ("sequences_waiting", "Answers that wait for their turn", max(0, active - parallel)),
            ("context_tokens", "Tokens that prompt and answer may have together", self.context),
        ]

    def sampling(self, asked: Mapping[str, Any]) -> Sampling:
        """The settings of a request: what it asks, over the server's defaults. None asks for nothing, 0 and -1 switch
        top_k off. Raises UsageError."""
        given = {name: value for name, value in asked.items() if value is not None}
        off = {"top_k": (0, -1)}
        given = {name: None if value in off.get(name, ()) else value for name, value in given.items()}
        bias = given.get("logit_bias", {})
        if any(token >= self.session.shape.vocab_size for token in bias):
            raise ServeError(400, f"logit_bias names a token beyond {self.session.shape.vocab_size - 1:,}")
        return replace(self.defaults, **given)

    async def start(self, request: Request) -> Answers:
        """Queue ``request``. Raises ServeError: 429 where too many wait, 400 for what cannot be answered."""
        if request.choices > self.limits.choices:
            raise ServeError(400, f"{request.choices} answers are asked for: expected {self.limits.choices} at most")
        room = self.limits.parallel + self.limits.queue - len(self.slots)
        if request.choices > room:
            self.metrics.refused()
            raise ServeError(429, f"{len(self.slots)} answers are under way or wait already", retry_after=RETRY_SECONDS)
        streams: list[Stream] = []
        try:
            if request.sampling.grammar is not None:  # read where it delays nobody, and before anything waits for it
                await asyncio.to_thread(self.session.runner.grammars.matcher, request.sampling.grammar)
            for prompt in request.prompts:
                for answer in range(request.n):
                    streams.append(self.session.submit(prompt, _numbered(request.sampling, answer)))
        except Exception as error:
            for stream in streams:
                stream.cancel()
            raise as_serve_error(error) from error
        self.metrics.started(request.choices)
        return Answers(streams, request, self.slots, self.metrics)


def _numbered(sampling: Sampling, answer: int) -> Sampling:
    """The settings of one of several answers, which differ whatever the seed."""
    if sampling.seed is None or not answer:
        return sampling
    return replace(sampling, seed=(sampling.seed + answer) % 2**64)
