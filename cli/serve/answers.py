"""Answers: what a request of any dialect comes to, and the tokens of its answers as they come."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cli.serve.errors import ServeError, as_serve_error
from cli.serve.mailbox import Mailbox
from cli.serve.metrics import Metrics
from cli.serve.parsing.parts import Parser, Part
from offload.records import Sampling, TokenRecord

if TYPE_CHECKING:  # it imports torch
    from offload.generate.stream import Stream


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

    def add(self, records: Sequence[TokenRecord], reasoning: int) -> None:
        """More tokens, ``reasoning`` of them thoughts."""
        self.completion += len(records)
        self.reasoning += reasoning
        for record in records:
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


@dataclass(slots=True)
class Step:
    """What one token added to answer ``choice``, or several that were there at once; the last of an answer has a
    ``finish``. ``records`` are the tokens'."""

    choice: int
    parts: list[Part]
    records: list[TokenRecord]

    @property
    def last(self) -> TokenRecord:
        """The latest token."""
        return self.records[-1]

    @property
    def finish(self) -> str:
        """Why the answer ends here, empty if it does not."""
        return self.records[-1].finish


@dataclass
class Whole:
    """An answer, put together: text and thoughts in one piece each, calls with all of their arguments."""

    parts: list[Part] = field(default_factory=list)
    records: list[TokenRecord] = field(default_factory=list)

    def add(self, step: Step) -> None:
        """What came next."""
        self.records += step.records
        for part in step.parts:
            join(self.parts, part)

    def text(self, kind: str = "text") -> str:
        """All parts of a ``kind``."""
        return "".join(part.text for part in self.parts if part.kind == kind)


def join(parts: list[Part], more: Part) -> None:
    """Add ``more`` to ``parts``: to the last, if it goes on with that."""
    if parts and more.kind == parts[-1].kind and not more.name:
        more = Part(more.kind, parts[-1].text + more.text, parts.pop().name)
    parts.append(more)


@dataclass
class Slot:
    """An answer under way, as /slots tells of it."""

    stream: "Stream"
    started: float = field(default_factory=time.monotonic)
    tokens: int = 0


class Answers:
    """The answers to ``request``, within ``seconds``. Iterate over ``steps``; whoever stops doing that calls ``close``.
    ``slots`` are those of all requests, by number."""

    def __init__(
        self, request: Request, slots: dict[int, Slot], metrics: Metrics, mailbox: Mailbox, seconds: float
    ) -> None:
        self.request, self.usage = request, Usage()
        self.open = set(range(request.choices))  # answers that are not finished
        self.streams: list[Stream] = []
        self._slots, self._metrics, self._mailbox = slots, metrics, mailbox
        self._said: deque[tuple[int, TokenRecord | BaseException | None]] = deque()
        self._news, self._waking = asyncio.Event(), False
        self._started = time.monotonic()
        late = ServeError(408, f"the answer took longer than the {seconds:g} s that --timeout allows", retry=False)
        self._late = asyncio.get_running_loop().call_later(seconds, self._hear, late)

    def tell(self, choice: int, said: TokenRecord | BaseException | None) -> None:
        """What has become of answer ``choice``. Callable from any thread."""
        self._said.append((choice, said))
        if not self._waking:
            self._waking = True
            self._mailbox.put(self._wake)

    def _wake(self) -> None:
        self._waking = False  # before it is looked at: what is told from now on wakes again
        self._news.set()

    def _hear(self, error: ServeError) -> None:
        self._said.append((0, error))
        self._news.set()

    @property
    def more(self) -> bool:
        """Whether ``steps`` goes on without waiting: another token is there already, or all are through."""
        return bool(self._said) or not self.open

    def begin(self, streams: "Sequence[Stream]") -> None:
        """These are under way."""
        self.streams = [*streams]
        self._slots |= {id(stream): Slot(stream) for stream in streams}
        self.usage.prompt = sum(stream.prompt_tokens for stream in streams[:: self.request.n])

    async def steps(self) -> AsyncGenerator[Step, None]:
        """Every token of every answer; those of one that are there at once in one step, unless their log probabilities
        are asked for: an event for each would cost as much as all of its text. Raises ServeError."""
        alone = self.request.sampling.logprobs is not None
        parsers = [self.request.parser() for _ in self.streams]
        try:
            while self.open:
                if not self._said:
                    self._news.clear()
                    await self._news.wait()
                    continue
                choice, said = self._said.popleft()
                if isinstance(said, BaseException):
                    raise as_serve_error(said) from said
                if said is None:  # every answer has a finish before, unless its stream was ended from elsewhere
                    if choice in self.open:
                        raise ServeError(503, "the server is shutting down")
                    continue
                records = [said]
                while self._said and not (alone or records[-1].finish):
                    following, said = self._said[0]
                    if following != choice or not isinstance(said, TokenRecord):
                        break
                    self._said.popleft()
                    records.append(said)
                yield Step(choice, self._parts(choice, records, parsers[choice]), records)
        finally:
            self.close()

    async def whole(self) -> list[Whole]:
        """Every answer, when all are finished. Raises ServeError."""
        found = [Whole() for _ in self.streams]
        async for step in self.steps():
            found[step.choice].add(step)
        return found

    def _parts(self, choice: int, records: list[TokenRecord], parser: Parser) -> list[Part]:
        """What ``records`` add to an answer, which are counted."""
        parts: list[Part] = []
        reasoning = 0
        # Which tokens are thoughts is seen one by one; text is taken apart at once.
        for together in [[record] for record in records] if parser.thinks else [records]:
            for part in parser.feed("".join([record.text for record in together])):
                join(parts, part)
            for part in parser.finish() if together[-1].finish else ():
                join(parts, part)
            reasoning += parser.reasoning
        self.usage.add(records, reasoning)
        stream = self.streams[choice]
        self._slots[id(stream)].tokens += len(records)
        if records[0].phase == "prefill":
            self.usage.cached += stream.cached_tokens if choice % self.request.n == 0 else 0
        self._metrics.tokens(records, stream.cached_tokens, time.monotonic() - self._started)
        if finish := records[-1].finish:
            self.open.discard(choice)
            self._slots.pop(id(stream), None)
            self._metrics.count("answers_finished", 1, finish)
        return parts

    def close(self) -> None:
        """Cancel what is not finished, within a step."""
        self._late.cancel()
        for stream in self.streams:
            if self._slots.pop(id(stream), None) is not None:
                stream.cancel()
                self._metrics.count("answers_finished", 1, "cancelled")
