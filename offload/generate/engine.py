"""Engine: the one thread that runs the model, for all who ask.

Prompts may be submitted from any thread. Whoever wants to look at what belongs to the model, its caches and counts,
has the engine do it between two steps.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from offload.batch.token_ids import packed_ids
from offload.generate.runner import Runner
from offload.generate.stream import Stream, Told
from offload.records import Sampling

Found = TypeVar("Found")


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
    """Has ``runner`` run the prompts that are submitted."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._inbox: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._closed = False
        self.after_step: Callable[[], None] | None = None  # called by the thread that runs the model

    def submit(self, ids: Sequence[int], sampling: Sampling, told: Told | None = None) -> Stream:
        """Queue a prompt; returns at once. ``told`` is Stream's. Raises what ``Runner.check`` does."""
        self._runner.check(ids, sampling)
        stream, own = (
            Stream(len(ids), self._cancelled, told),
            packed_ids(ids),
        )  # the caller's may be many bytes, or change
        self._put(_Call(lambda: self._runner.add(own, sampling, stream)))
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
        """End every sequence and the thread, in the midst of a step if need be."""
        self._closed = True
        if self._thread is not None:
            self._runner.decoder.abandon()
            self._inbox.put(None)
            self._thread.join()
            self._take(wait=False)
            self._runner.decoder.resume()
        self._runner.end_all()

    def _cancelled(self, stream: Stream) -> None:
        with self._runner.lock:
            if self._runner.runs_only(stream):
                self._runner.decoder.abandon()

    def _put(self, call: _Call) -> None:
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._work, name="engine", daemon=True)
                thread.start()  # where the system starts no more of them the next call tries again
                self._thread = thread
        self._inbox.put(call)

    def _work(self) -> None:
        busy = False
        while not self._closed:
            self._take(wait=not busy)
            try:
                busy = not self._closed and self._runner.step()
            except BaseException as error:  # noqa: BLE001 - raised where the streams are read, which would wait for ever
                self._runner.end_all(error)
                busy = False
            if self.after_step is not None:
                self.after_step()

    def _take(self, *, wait: bool) -> None:
        """Do what was asked in the meantime; ``wait`` until there is something."""
        while wait or not self._inbox.empty():
            call = self._inbox.get()
            if call is not None:
                call.run()
            wait = False
