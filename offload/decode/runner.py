"""Launching decode steps: on a GPU as one CUDA graph, on a CPU by a thread that stands for the GPU.

A launch returns at once, and another thread answers the step's doorbell. The launch itself is made by a
thread of its own, which then waits for the step's end: a launch may block until earlier work of the graph is
done, and that work may be waiting for an answer.
"""

import gc
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from offload.decode.gpu_step import DecodeStep
from offload.hardware.cuda_driver import gpu_errors

_WARM_UPS = 2


class StepThread:
    """Runs steps one at a time, as a stream would. On a CPU it computes them itself.

    ``launched`` is set once a step is under way, and ``ended_at`` is when the last one ended, in seconds of
    ``time.perf_counter``.
    """

    def __init__(self, step: DecodeStep) -> None:
        self._step = step
        self._thread = ThreadPoolExecutor(1, "decode-step")
        self._running: Future[None] | None = None
        self.launched = threading.Event()
        self.ended_at = 0.0

    def launch(self, ended: Callable[[], None]) -> None:
        """Begin a step on the staged inputs; its thread calls ``ended`` once it has ended, well or not."""
        self.launched.clear()
        self._running = self._thread.submit(self._run, ended)

    def result(self) -> None:
        """Wait until the step has ended. Raises what it raised, or MachineError if the GPU failed."""
        assert self._running is not None, "a step has been launched"
        self._running.result()

    def wait(self) -> None:
        """Until the step has ended, well or not."""
        if self._running is not None:
            self._running.exception()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    def _run(self, ended: Callable[[], None]) -> None:
        try:
            self._compute()
        finally:
            self.ended_at = time.perf_counter()
            self.launched.set()
            ended()

    @torch.inference_mode()
    def _compute(self) -> None:
        self.launched.set()
        self._step.inputs.upload()
        self._step()
        self._step.fetch()


class GraphThread(StepThread):
    """Replays the step as a CUDA graph, captured here. ``stop`` and ``rearm`` keep its doorbell silent
    while the step runs to warm up: then nobody answers.

    Raises MachineError if the GPU fails or has no memory for the graph.
    """

    def __init__(
        self, step: DecodeStep, device: torch.device, stop: Callable[[], None], rearm: Callable[[], None]
    ) -> None:
        super().__init__(step)
        self._device, self._stop = device, stop
        self._stream = torch.cuda.current_stream(device)
        # Who waits for it sleeps: a core that spins is one that computes no missed experts.
        self._done = torch.cuda.Event(blocking=True)
        self._graph = torch.cuda.CUDAGraph()
        with gpu_errors():
            stop()
            self._capture()
            torch.cuda.synchronize(device)
            rearm()

    @torch.inference_mode()
    def _capture(self) -> None:
        side = torch.cuda.Stream(self._device)
        side.wait_stream(self._stream)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):  # kernels are compiled, workspaces made
                self._step()
        self._stream.wait_stream(side)
        # What an earlier run has left is destroyed now: not all of that may happen while a stream captures.
        gc.collect()
        collects = gc.isenabled()
        gc.disable()
        try:
            self._record(side)
        finally:
            if collects:
                gc.enable()

    def _record(self, side: torch.cuda.Stream) -> None:
        # Reading threads go on while this one captures: calls of theirs are no part of the graph.
        with torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local"):
            self._step()

    @torch.inference_mode()
    def _compute(self) -> None:
        with gpu_errors(), torch.cuda.stream(self._stream):
            try:
                self._step.inputs.upload()
                self._graph.replay()
                self._step.fetch()
                self._done.record(self._stream)
            except BaseException:  # what is under way all the same waits for nobody, and is waited for
                self._stop()
                self._stream.synchronize()
                raise
            self.launched.set()
            self._done.synchronize()
