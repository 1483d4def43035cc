"""Launching decode steps: on a GPU as one CUDA graph, on a CPU by a thread that stands for the GPU.

A launch returns at once, and the caller is free to answer the step's doorbell. The launch itself is made by
a thread of its own: a launch may block until earlier work of the graph is done, and that work may be
waiting for the caller.
"""

import gc
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from offload.driver import gpu_errors
from offload.step import DecodeStep

_WARM_UPS = 2


class StepThread:
    """Runs steps one at a time, as a stream would. On a CPU it computes them itself."""

    slice_microseconds = 1000  # how long the caller may serve the doorbell before it asks again

    def __init__(self, step: DecodeStep) -> None:
        self._step = step
        self._thread = ThreadPoolExecutor(1, "decode-step")
        self._running: Future[None] | None = None

    def launch(self) -> None:
        """Begin a step on the staged inputs."""
        self._running = self._thread.submit(self._run)

    def finished(self) -> bool:
        """Whether the step has ended. Raises what it raised."""
        assert self._running is not None, "a step has been launched"
        if not self._running.done():
            return False
        self._running.result()
        return True

    def wait(self) -> None:
        """Until the step has ended, well or not."""
        if self._running is not None:
            self._running.exception()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    @torch.inference_mode()
    def _run(self) -> None:
        self._step.inputs.upload()
        self._step()
        self._step.fetch()


class GraphThread(StepThread):
    """Replays the step as a CUDA graph, captured here. ``stop`` and ``rearm`` keep its doorbell silent
    while the step runs to warm up: then nobody answers.

    Raises MachineError if the GPU fails or has no memory for the graph.
    """

    slice_microseconds = 50

    def __init__(
        self, step: DecodeStep, device: torch.device, stop: Callable[[], None], rearm: Callable[[], None]
    ) -> None:
        super().__init__(step)
        self._device = device
        self._stream = torch.cuda.current_stream(device)
        self._done = torch.cuda.Event()
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

    def finished(self) -> bool:
        """Whether the step has ended. Raises MachineError if the GPU failed."""
        if not super().finished():
            return False
        with gpu_errors():
            return bool(self._done.query())

    def wait(self) -> None:
        """Until the step has ended, well or not."""
        super().wait()
        with gpu_errors():
            self._done.synchronize()

    @torch.inference_mode()
    def _run(self) -> None:
        with gpu_errors(), torch.cuda.stream(self._stream):
            self._step.inputs.upload()
            self._graph.replay()
            self._step.fetch()
            self._done.record(self._stream)
