"""Engine: the one thread that runs the model, for all who ask.

Prompts may be submitted from any thread and wait in the order in which they came. Whoever wants to look at what
belongs to the model, its caches and counts, has the engine do it between two steps.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeVar

from offload.decode.decoder import StepAbandoned
from offload.records import Sampling
from offload.run.generate import Generator
from offload.run.stream import Stream

Found = TypeVar("Found")


@dataclass(frozen=True)
class _Asked:
    """A prompt that waits for its turn."""

    ids: Sequence[int]
    sampling: Sampling
    stream: Stream


class _Call:
    """Work for the engine's thread, and who waits for its result."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work, self.result = work, Future[Any]()

    def run(self) -> None:
        try:
            self.result.set_result(self._work())
        except BaseException as error:  # noqa: BLE001 - whoever waits gets it
            self.result.set_exception(error)


class Engine:
    """Runs prompts through ``generator``, one after the other."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._inbox: queue.SimpleQueue[_Asked | _Call | None] = queue.SimpleQueue()
        self._waiting: deque[_Asked] = deque()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._running: Stream | None = None
        self._closed = False

    def submit(self, ids: Sequence[int], sampling: Sampling) -> Stream:
        """Queue a prompt; returns at once. Raises what ``Generator.check`` does."""
        self._generator.check(ids, sampling)
        stream = Stream(len(ids), self._cancelled)
        self._put(_Asked(list(ids), sampling, stream))
        return stream

    def call(self, work: Callable[[], Found]) -> Found:
        """What ``work`` returns, done by the engine's thread between two steps; raises what it raises."""
        if threading.current_thread() is self._thread or self._closed:
            return work()
        call = _Call(work)
        self._put(call)
        found: Found = call.result.result()
        return found

    def close(self) -> None:
        """End every sequence and the thread."""
        self._closed = True
        if self._thread is None:
            return
        if (running := self._running) is not None:
            running.cancel()
        self._inbox.put(None)
        self._thread.join()
        self._take(wait=False)
        for asked in self._waiting:
            asked.stream.end()

    def _cancelled(self, stream: Stream) -> None:
        with self._lock:
            if self._running is stream:
                self._generator.decoder.abandon()

    def _put(self, item: _Asked | _Call) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
                self._thread.start()
        self._inbox.put(item)

    def _work(self) -> None:
        while not self._closed:
            self._take(wait=not self._waiting)
            if self._waiting and not self._closed:
                self._run(self._waiting.popleft())

    def _take(self, *, wait: bool) -> None:
        """Do what was asked in the meantime; ``wait`` until there is something."""
        while wait or not self._inbox.empty():
            item = self._inbox.get()
            if isinstance(item, _Asked):
                self._waiting.append(item)
            elif isinstance(item, _Call):
                item.run()
            wait = wait and not self._waiting and item is not None

    def _run(self, asked: _Asked) -> None:
        stream, error = asked.stream, None
        self._running = stream
        try:
            if not stream.cancelled:
                with closing(self._generator.generate(asked.ids, asked.sampling)) as records:
                    for record in records:
                        if record.phase == "prefill":
                            stream.cached_tokens = stream.prompt_tokens - record.tokens_in
                        stream.push(record)
                        self._take(wait=False)
                        if stream.cancelled or self._closed:
                            break
        except StepAbandoned:
            pass
        except BaseException as raised:  # noqa: BLE001 - it is raised where the stream is read
            error = raised
        with self._lock:
            self._running = None
            self._generator.decoder.resume()
        stream.end(error)
