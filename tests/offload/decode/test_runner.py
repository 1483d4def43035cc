"""How a step is captured: after every kernel has run once, by doubles of torch.cuda's objects that keep the
order of calls. Whether a card takes it is for ``test_gpu_card.py``."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from offload.decode.runner import GraphThread
from quant.errors import MachineError


class Calls(list[str]):
    """The order in which things happened."""

    failing: str | None = None

    def say(self, what: str) -> None:
        self.append(what)
        if what == self.failing:
            raise RuntimeError("CUDA error: out of order")


class Stream:
    def __init__(self, device: object = None) -> None:
        pass

    def wait_stream(self, other: "Stream") -> None:
        pass


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    found = Calls()

    @contextmanager
    def stream(on: Stream) -> Iterator[None]:
        yield

    @contextmanager
    def graph(graph: object, *, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        found.say(f"capture {capture_error_mode}, collecting {gc.isenabled()}")
        yield
        found.say("captured")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Event", lambda **options: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: found.say("wait"))
    return found


def thread(calls: Calls) -> Any:
    step: Any = lambda: calls.say("step")  # noqa: E731
    return GraphThread(step, torch.device("cpu"), lambda: calls.say("stop"), lambda: calls.say("rearm"))


def test_a_step_runs_before_it_is_captured_with_nobody_to_answer(calls: Calls) -> None:
    thread(calls).close()
    assert calls == [
        "stop",
        "step",
        "step",
        "capture thread_local, collecting False",
        "step",
        "captured",
        "wait",
        "rearm",
    ]
    assert gc.isenabled()


@pytest.mark.parametrize("failing", ["step", "captured"])
def test_a_capture_that_fails_is_one_line_and_garbage_is_collected_again(calls: Calls, failing: str) -> None:
    calls.failing = failing
    with pytest.raises(MachineError, match="the GPU or its driver failed: CUDA error: out of order"):
        thread(calls)
    assert gc.isenabled()
