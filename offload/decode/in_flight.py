"""InFlightStep: a decode step under way, and the thread that answers its doorbell until it has ended.

The caller may do host work while the step runs. The expert cache belongs to one thread at a time: to the
caller until it calls ``attend``, and to the doorbell's thread from then on until the step has ended. A step
that nobody comes back for ends by itself. Whatever goes wrong, the step is told to wait no longer, and its
end is awaited before the error goes on: neither side is left hanging.
"""

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from offload.decode.host_worker import HostWorker
from offload.decode.runner import StepThread
from quant.errors import MachineError

# Microseconds until the doorbell's thread looks up from its work. It needs Python's lock for that, which may
# be taken: seldom. The kernels' threads stay awake for so long after the last step.
_SLICE = 20_000
_LAUNCH_S = 1e-3  # what a launch takes; one that takes longer may be waiting for what comes after it


class InFlightStep:
    """Runs the steps of ``step``, one at a time, answered by ``worker``."""

    def __init__(self, worker: HostWorker, step: StepThread) -> None:
        self._worker, self._bell, self._step = worker, worker.bell, step
        self._thread = ThreadPoolExecutor(1, "doorbell")
        self._serving: Future[None] | None = None
        self._attended = threading.Event()
        self._flying = self._given_up = False

    def launch(self) -> None:
        """Begin a step. Until ``attend``, the cache is still the caller's."""
        self.abandon()
        self._attended.clear()
        self._serving, self._given_up, self._flying = None, False, True
        self._step.launch(self._bell.stop)
        self._serving = self._thread.submit(self._serve)
        # Both threads need Python's lock to begin with, which the caller will hardly let go of.
        self._step.launched.wait(_LAUNCH_S)

    def attend(self) -> None:
        """Leave the cache to the doorbell's thread, until ``finish`` or ``synchronize``."""
        self._attended.set()

    def synchronize(self) -> None:
        """Wait until the step, if there is one, has ended; ``finish`` will still say how."""
        if self._flying:
            self.attend()
            self._step.wait()
            if self._serving is not None:
                self._serving.exception()

    def finish(self) -> None:
        """Wait until the step has ended.

        Raises what the step raised, CheckpointError if the disk fails and MachineError if the step gave up
        waiting.
        """
        assert self._serving is not None, "a step has been launched"
        self.attend()
        try:
            self._step.result()
            self._serving.result()
        except BaseException:  # KeyboardInterrupt too
            self.abandon()
            raise
        self._flying = False
        self._bell.rearm()

    def abandon(self) -> None:
        """End the step that is under way, if there is one, at once: what it computes means nothing."""
        if not self._flying:
            return
        self._given_up = True
        self._bell.stop()
        self.synchronize()
        self._flying = False
        self._bell.rearm()

    def close(self) -> None:
        """End both threads."""
        self.abandon()
        self._thread.shutdown()
        self._step.close()

    @torch.inference_mode()
    def _serve(self) -> None:
        """Answer until the step has ended: it sets the stop word, as does who gives it up."""
        try:
            while (state := self._bell.serve(_SLICE)) != "stopped":
                if state == "idle":
                    continue
                self._attended.wait()
                if self._given_up:
                    return
                self._worker.fetch()
            if self._bell.lost and not self._given_up:
                raise MachineError(
                    "the GPU waited for experts from the CPU until its time limit ran out: is the machine "
                    "suspended or out of memory? Start again, or use --no-graph"
                )
        except BaseException:
            self._bell.stop()
            raise
