"""The step's end of the doorbell: kernels and references ask for the same and wait for the same answer."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from quant.errors import SchemeError
from quant.kernels.cuda import bell
from quant.kernels.cuda.doorbell import ANSWERED, LOST, RUNG, STOP, BellBuffers, load_acquire, store_release
from quant.kernels.cuda.experts import ChosenExperts

TOKENS, TOP_K, HIDDEN, INTER = 2, 2, 96, 256
CHOSEN = torch.tensor([[0, 1], [2, -1]], dtype=torch.int32)
PLACES = torch.tensor([0, 1, 2, 0], dtype=torch.uint8)
GPU_ROWS = torch.tensor([128], dtype=torch.int32)


@pytest.fixture(params=["kernel", "reference"])
def side(
    request: pytest.FixtureRequest, device: torch.device
) -> tuple[Callable[..., None], Callable[..., None], torch.device]:
    """(ring, answer, where they run): the Triton kernels, or the references of a step on the CPU."""
    if request.param == "kernel":
        return bell.launch_ring, bell.launch_answer, device
    if device.type == "cuda":
        pytest.skip("the references run on the CPU")
    return bell.ring_reference, bell.answer_reference, device


def asked(
    place: torch.device | None = None,
    chosen: torch.Tensor = CHOSEN,
    scores: torch.Tensor | None = None,
    places: torch.Tensor = PLACES,
    gpu_rows: torch.Tensor = GPU_ROWS,
) -> ChosenExperts:
    tensors = (chosen, torch.zeros(chosen.shape) if scores is None else scores, torch.zeros(0), places, gpu_rows)
    return ChosenExperts(*(tensor.to(place) for tensor in tensors), scales_input=True)


def test_a_ring_publishes_what_is_the_hosts_and_only_if_something_is(side: Any) -> None:
    ring, _, place = side
    buffers = BellBuffers.allocate(TOKENS, TOP_K, HIDDEN, place)
    x, scores = torch.randn(TOKENS, HIDDEN).bfloat16(), torch.rand(TOKENS, TOP_K)
    for places, row in ((torch.zeros_like(PLACES), 3), (PLACES, 7)):
        ring(x.to(place), asked(place, scores=scores, places=places), row, INTER, buffers)
        if place.type == "cuda":
            torch.cuda.synchronize()
    assert load_acquire(buffers.control, RUNG) == int(buffers.sequence) == 1
    experts, first = [0, 1, 2, 0], [INTER, 128, 0, INTER]
    assert buffers.request.tolist() == [7, TOKENS, TOP_K, 0, *experts, *first]
    assert torch.equal(buffers.scores, scores)
    assert torch.equal(buffers.x, x.float())


def test_an_answer_is_waited_for_and_added_once(side: Any) -> None:
    ring, answer, place = side
    buffers = BellBuffers.allocate(TOKENS, TOP_K, HIDDEN, place)
    x = torch.zeros(TOKENS, HIDDEN, dtype=torch.bfloat16, device=place)
    out = torch.ones(TOKENS, HIDDEN, device=place)
    partial = torch.randn(TOKENS, HIDDEN)

    def host() -> None:
        deadline = time.monotonic() + 30
        while load_acquire(buffers.control, RUNG) != 1 and time.monotonic() < deadline:
            time.sleep(0.001)
        buffers.result.copy_(partial)
        store_release(buffers.control, ANSWERED, 1)

    worker = threading.Thread(target=host)
    worker.start()
    ring(x, asked(place), 0, INTER, buffers)
    answer(asked(place), INTER, buffers, out, bell.PATIENCE)
    answer(asked(place, places=torch.zeros_like(PLACES)), INTER, buffers, out, bell.PATIENCE)  # asked for nothing
    worker.join()
    assert torch.equal(out.cpu(), 1 + partial)
    assert load_acquire(buffers.control, LOST) == 0


@pytest.mark.parametrize("reason", ["no answer", "stop", "an answer was lost before"])
def test_a_dead_host_cannot_hang_the_step(side: Any, reason: str) -> None:
    _, answer, place = side
    buffers = BellBuffers.allocate(TOKENS, TOP_K, HIDDEN, place)
    buffers.sequence.fill_(5)
    store_release(buffers.control, STOP, int(reason == "stop"))
    store_release(buffers.control, LOST, 3 if "lost" in reason else 0)
    out = torch.ones(TOKENS, HIDDEN, device=place)
    patience = 700 if reason == "no answer" else bell.PATIENCE
    answer(asked(place), INTER, buffers, out, patience)
    if place.type == "cuda":
        torch.cuda.synchronize()
    assert load_acquire(buffers.control, LOST) == 5
    assert (out == 1).all()


LOGITS = {
    "one": (torch.tensor([[0.5, 2.0, 1.0, -1.0]]), PLACES, 1),
    "one in vram": (torch.tensor([[3.5, 2.0, 1.0, -1.0]]), PLACES, 1),
    "the lowest of equals": (torch.tensor([[0.0, 2.0, 2.0, 2.0]]), PLACES, 2),
    "not a number": (torch.tensor([[float("nan"), float("nan"), -2.0, float("nan")]]), PLACES, 2),
    "three of five": (torch.tensor([[0.1, 5.0, 0.3, 4.0, 0.2]]), torch.tensor([1, 1, 2, 0, 1]).byte(), 3),
}


@pytest.mark.parametrize("case", LOGITS)
@pytest.mark.parametrize("missed", [True, False])
def test_a_ring_says_what_comes_next_whether_or_not_it_rings(case: str, missed: bool, side: Any) -> None:
    ring, _, place = side
    logits, places, top_k = LOGITS[case]
    buffers = BellBuffers.allocate(1, top_k, HIDDEN, place)
    x = torch.zeros(1, HIDDEN, dtype=torch.bfloat16, device=place)
    here = torch.full_like(places, int(missed))
    wish = asked(place, torch.zeros(1, top_k).int(), places=here, gpu_rows=torch.zeros(1).int())

    def said(outlook: bell.Outlook) -> list[int]:
        ring(x, wish, 3, INTER, buffers, outlook)
        if place.type == "cuda":
            torch.cuda.synchronize()
        return buffers.hint.tolist()  # type: ignore[no-any-return]

    ranked = sorted(range(logits.numel()), key=lambda e: (-float(logits[0, e].nan_to_num(-3e38)), e))[:top_k]
    wanted = [0 if places[e] == 0 else 1 + 4 * logits.numel() + e for e in ranked]
    assert said(None) == [0] * top_k
    assert said(bell.Coming(4, logits.to(place), places.to(place))) == wanted
    assert said(None) == wanted
    assert said(bell.Nothing()) == [0] * top_k
    assert load_acquire(buffers.control, RUNG) == (4 if missed else 0)


def test_what_comes_next_is_said_of_one_token() -> None:
    buffers = BellBuffers.allocate(TOKENS, TOP_K, HIDDEN, torch.device("cpu"))
    with pytest.raises(SchemeError, match="2 tokens"):
        bell.ring(torch.zeros(TOKENS, HIDDEN), asked(), 0, INTER, buffers, bell.Nothing())


def test_buffers_too_small_are_refused() -> None:
    buffers = BellBuffers.allocate(1, 1, HIDDEN, torch.device("cpu"))
    with pytest.raises(SchemeError, match="the doorbell's buffers are for 1 experts"):
        bell.ring(torch.zeros(TOKENS, HIDDEN), asked(), 0, INTER, buffers)
