"""Service: one loaded model, and what clients of every dialect may have of it."""

import asyncio
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING, Any

from cli.serve.answers import Answers, Request, Slot
from cli.serve.errors import ServeError, as_serve_error
from cli.serve.mailbox import Mailbox
from cli.serve.metrics import Metrics
from offload.records import Sampling
from offload.vision.image_url import ImageSources

if TYPE_CHECKING:  # they import torch
    from offload.generate.stream import Stream
    from offload.run.session import Session

RETRY_SECONDS = 2


@dataclass(frozen=True)
class Limits:
    """What clients may use: answers at once and waiting, bytes of a body, characters of a JSON schema, choices and
    images of one request, and the seconds that it may take."""

    parallel: int = 1
    queue: int = 32
    body_bytes: int = 32 << 20
    schema_bytes: int = 64 << 10
    choices: int = 16
    images: int = 16
    seconds: float = 3600.0


@dataclass
class Service:
    """Answers requests with ``session``, whose model clients know as ``name``; ``defaults`` are the settings of a
    request that says nothing. Everything but the session lives on the event loop."""

    session: "Session"
    name: str
    defaults: Sampling
    limits: Limits
    images: ImageSources = field(default_factory=ImageSources)

    def __post_init__(self) -> None:
        self.slots: dict[int, Slot] = {}
        self.started = int(time.time())
        self.metrics = Metrics(self.gauges)
        self.version = metadata.version("coldstream")
        self._mailbox: Mailbox | None = None  # of the loop that requests come from
        self.looking = threading.Lock()  # one prompt's pictures are taken apart at a time: they are large

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.session.context

    @property
    def vision(self) -> bool:
        """Whether images can be looked at."""
        return self.session.shape.reads_images and self.session.options.images

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
            self.metrics.count("requests_refused")
            raise ServeError(429, f"{len(self.slots)} answers are under way or wait already", retry_after=RETRY_SECONDS)
        if self._mailbox is None:
            self._mailbox = Mailbox()
            self.session.after_steps(self._mailbox.wake)
        answers = Answers(request, self.slots, self.metrics, self._mailbox, self.limits.seconds)
        streams: list[Stream] = []
        try:
            if request.sampling.grammar is not None:  # read where it delays nobody, and before anything waits for it
                await asyncio.to_thread(self.session.runner.grammars.matcher, request.sampling.grammar)
            for choice in range(request.choices):
                prompt, answer = divmod(choice, request.n)
                sampling, told = _numbered(request.sampling, answer), partial(answers.tell, choice)
                streams.append(self.session.submit(request.prompts[prompt], sampling, told=told))
        except Exception as error:
            answers.close()
            for stream in streams:
                stream.cancel()
            raise as_serve_error(error) from error
        answers.begin(streams)
        self.metrics.count("answers_started", request.choices)
        return answers


def _numbered(sampling: Sampling, answer: int) -> Sampling:
    """The settings of one of several answers, which differ whatever the seed."""
    if sampling.seed is None or not answer:
        return sampling
    return replace(sampling, seed=(sampling.seed + answer) % 2**64)
