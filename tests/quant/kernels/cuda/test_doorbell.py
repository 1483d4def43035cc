"""The doorbell: parts of experts computed by the host add up, and nobody waits for ever."""

import threading
import time
from itertools import chain

import pytest
import torch

from quant.errors import MachineError, SchemeError
from quant.kernels.cuda.doorbell import ANSWERED, RUNG, BellBuffers, HostBell, Prefetched, load_acquire, store_release
from quant.kernels.moe import GatedMlp
from quant.kernels.native import Weight
from quant.pack import dequantize, quantize_absmax
from quant.scheme import Scheme

H, INNER, E, LAYERS = 128, 512, 4, 2
CPU = torch.device("cpu")


class Experts:
    """Random experts of one layout, each in memory of its own."""

    def __init__(self, scheme: Scheme) -> None:
        generator = torch.Generator().manual_seed(3)
        self.memory: list[torch.Tensor] = []
        self.native: list[GatedMlp] = []
        self.dense: list[list[torch.Tensor]] = []
        for _ in range(LAYERS * E):
            stored = [
                quantize_absmax(torch.randn(shape, generator=generator) / shape[1] ** 0.5, scheme)
                for shape in ((INNER, H), (INNER, H), (H, INNER))
            ]
            tensors = [tensor for part in stored for tensor in (part.packed, part.scale)]
            slot = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in tensors])
            views, at = [], 0
            for tensor in tensors:
                views.append(slot[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
                at += tensor.nbytes
            kind = "int4" if scheme.bits == 4 else "int8"
            self.memory.append(slot)
            self.native.append(
                GatedMlp(*(Weight.from_tensors(kind, *views[i : i + 2]) for i in (0, 2, 4)))  # type: ignore[arg-type]
            )
            self.dense.append([dequantize(part).double() for part in stored])

    def reference(self, index: int, x: torch.Tensor, first: int) -> torch.Tensor:
        gate, up, down = self.dense[index]
        x = x.double()
        return (torch.nn.functional.silu(x @ gate[first:].T) * (x @ up[first:].T)) @ down[:, first:].T


def ring(buffers: BellBuffers, layer: int, ids: list[list[int]], first: list[list[int]]) -> None:
    """What the step writes."""
    tokens, k = len(ids), len(ids[0])
    words = [layer, tokens, k, 0, *chain(*ids), *chain(*first)]
    buffers.request[: len(words)] = torch.tensor(words, dtype=torch.int32)
    buffers.sequence.add_(1)
    store_release(buffers.control, RUNG, int(buffers.sequence))


def host_bell(
    experts: Experts, tokens: int, k: int, *, scales_input: bool, exact: bool = True, **prefetch: int
) -> HostBell:
    buffers = BellBuffers.allocate(tokens, k, H, CPU)
    generator = torch.Generator().manual_seed(5)
    buffers.x.copy_(torch.randn(tokens, H, generator=generator))
    buffers.scores.copy_(torch.rand(tokens, k, generator=generator))
    table = torch.zeros(LAYERS, E, dtype=torch.int64)
    bell = HostBell(buffers, experts.native[:LAYERS], table, scales_input=scales_input, exact=exact, **prefetch)
    for index, slot in enumerate(experts.memory):
        bell.table[index // E, index % E] = slot.data_ptr()
    return bell


def expected(
    experts: Experts, bell: HostBell, layer: int, ids: list[list[int]], first: list[list[int]], scales_input: bool
) -> torch.Tensor:
    out = torch.zeros(len(ids), H, dtype=torch.float64)
    for token, row in enumerate(ids):
        for rank, expert in enumerate(row):
            score, x = bell.buffers.scores[token, rank].double(), bell.buffers.x[token : token + 1]
            at = layer * E + expert
            if scales_input:
                out[token] += experts.reference(at, x * score, first[token][rank])[0]
            else:
                out[token] += experts.reference(at, x, first[token][rank])[0] * score
    return out


@pytest.mark.parametrize("scheme", [Scheme("int4", 128), Scheme("int4", 32), Scheme("int8", 128)], ids=str)
@pytest.mark.parametrize("scales_input", [True, False])
@pytest.mark.parametrize("exact", [True, False])
def test_parts_of_experts_equal_the_reference(scheme: Scheme, scales_input: bool, exact: bool) -> None:
    experts = Experts(scheme)
    bell = host_bell(experts, 3, 2, scales_input=scales_input, exact=exact)
    ids, first = [[0, 3], [2, 1], [3, 0]], [[0, 128], [INNER, 384], [256, INNER]]
    ring(bell.buffers, 1, ids, first)
    assert bell.serve(1) == "idle"
    assert load_acquire(bell.buffers.control, ANSWERED) == 1
    wanted = expected(experts, bell, 1, ids, first, scales_input)
    tolerance = 1e-5 if exact else 0.02 * float(wanted.abs().max())
    assert torch.allclose(bell.buffers.result.double(), wanted, atol=tolerance)


def test_a_missing_expert_is_left_to_the_caller() -> None:
    experts = Experts(Scheme("int4", 128))
    bell = host_bell(experts, 1, 2, scales_input=False)
    bell.table[0, 2] = 0
    ring(bell.buffers, 0, [[2, 1]], [[128, 0]])
    assert bell.serve(1_000_000) == "missing"  # at once, not after the second
    assert load_acquire(bell.buffers.control, ANSWERED) == 0
    request = bell.request()
    assert (request.layer, request.experts) == (0, (1, 2))
    bell.begin()
    for expert in request.experts:
        bell.add(expert, experts.memory[expert].data_ptr())
    bell.answer()
    assert bell.serve(1) == "idle"
    wanted = expected(experts, bell, 0, [[2, 1]], [[128, 0]], False)
    assert torch.allclose(bell.buffers.result.double(), wanted, atol=1e-5)


def test_an_expert_that_the_host_computes_nothing_of_need_not_be_there() -> None:
    experts = Experts(Scheme("int4", 128))
    bell = host_bell(experts, 1, 2, scales_input=False)
    bell.table[0, 2] = 0
    ring(bell.buffers, 0, [[2, 1]], [[INNER, 0]])
    assert bell.request().experts == (1,)
    assert bell.serve(1) == "idle"
    assert load_acquire(bell.buffers.control, ANSWERED) == 1


def test_a_thousand_requests_from_another_thread_are_all_answered() -> None:
    experts = Experts(Scheme("int4", 128))
    bell = host_bell(experts, 1, 1, scales_input=True)
    results: list[torch.Tensor] = []

    def step() -> None:
        for number in range(1, 1001):
            ring(bell.buffers, number % LAYERS, [[number % E]], [[0]])
            while load_acquire(bell.buffers.control, ANSWERED) != number:
                time.sleep(0)
            results.append(bell.buffers.result.clone())

    thread = threading.Thread(target=step)
    thread.start()
    while thread.is_alive():
        assert bell.serve(200) == "idle"
    thread.join()
    wanted = [expected(experts, bell, layer, [[e]], [[0]], True) for layer in range(LAYERS) for e in range(E)]
    assert len(results) == 1000
    for number, result in enumerate(results, 1):
        assert torch.allclose(result.double(), wanted[number % LAYERS * E + number % E], atol=1e-5)


def test_serving_ends_when_told_to_stop_and_goes_on_after() -> None:
    experts = Experts(Scheme("int4", 128))
    bell = host_bell(experts, 1, 1, scales_input=True)
    ring(bell.buffers, 0, [[0]], [[0]])
    bell.stop()
    assert bell.serve(10_000_000) == "stopped"
    bell.rearm()
    assert bell.serve(1) == "idle"
    ring(bell.buffers, 0, [[1]], [[0]])
    bell.serve(1)
    assert load_acquire(bell.buffers.control, ANSWERED) == 2


@pytest.mark.parametrize(("ids", "first", "layer"), [([[E]], [[0]], 0), ([[0]], [[7]], 0), ([[0]], [[0]], LAYERS)])
def test_a_request_that_makes_no_sense_is_an_error(ids: list[list[int]], first: list[list[int]], layer: int) -> None:
    experts = Experts(Scheme("int4", 128))
    bell = host_bell(experts, 1, 1, scales_input=True)
    ring(bell.buffers, layer, ids, first)
    with pytest.raises(MachineError, match="bell_serve failed"):
        bell.serve(1)


def test_experts_in_another_form_are_refused() -> None:
    experts = Experts(Scheme("int4", 128))
    dense = [Weight.from_tensors("bf16", part.bfloat16()) for part in experts.dense[0]]
    table = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(SchemeError, match="serves int2 to int8"):
        HostBell(BellBuffers.allocate(1, 1, H, CPU), [GatedMlp(*dense)], table, scales_input=True, exact=True)


def hint(bell: HostBell, *wanted: tuple[int, int] | None) -> None:
    """What the step writes of the (layer, expert) that it expects."""
    for rank, one in enumerate(wanted):
        store_release(bell.buffers.hint, rank, 0 if one is None else 1 + one[0] * E + one[1])


SLOT = 3 * (H * INNER // 2 + H * INNER // 128 * 2)  # bytes of an expert
HALF = 3 * (H * INNER // 4 + H * INNER // 256 * 2)


def test_what_is_hinted_at_is_read_once_and_no_more_than_allowed() -> None:
    experts = Experts(Scheme("int4", 128))
    bell = host_bell(experts, 1, 1, scales_input=True, prefetch_bytes=2**22)
    bell.serve(1)
    assert bell.prefetched == Prefetched(0, 0, 0, 0)
    hint(bell, (1, 2))
    for _ in range(3):
        assert bell.serve(100) == "idle"
    assert bell.prefetched == Prefetched(1, SLOT, 0, 0)
    half = host_bell(experts, 1, 1, scales_input=True, prefetch_bytes=SLOT)
    hint(half, (1, 2))
    half.serve(100)
    # Gate and up, which are computed first; what is left for down is not worth a pass of its own.
    assert half.prefetched.nbytes == SLOT // 3 * 2
    small = host_bell(experts, 1, 1, scales_input=True, prefetch_bytes=5000)
    hint(small, (1, 2))
    small.serve(100)
    assert 5000 - 2 * 66 * 2 <= small.prefetched.nbytes <= 5000  # each worker stops before its part is exceeded
    shared = host_bell(experts, 1, 1, scales_input=True, prefetch_bytes=2**22, gpu_rows=INNER // 2)
    hint(shared, (1, 2))
    shared.serve(100)
    assert shared.prefetched.nbytes == HALF


def test_what_is_not_in_memory_or_makes_no_sense_is_not_read() -> None:
    experts = Experts(Scheme("int4", 128))
    for wanted in (None, (1, 2), (LAYERS, 0), (-5, 0), (0, 2**28)):
        bell = host_bell(experts, 1, 1, scales_input=True, prefetch_bytes=2**22)
        bell.table[1, 2] = 0
        hint(bell, wanted)
        assert bell.serve(100) == "idle"
        assert bell.prefetched == Prefetched(0, 0, 0, 0)
    off = host_bell(experts, 1, 1, scales_input=True)
    hint(off, (0, 1))
    off.serve(100)
    assert off.prefetched == Prefetched(0, 0, 0, 0)


def test_what_was_foreseen_is_counted() -> None:
    experts = Experts(Scheme("int4", 128))
    bell = host_bell(experts, 1, 2, scales_input=True, prefetch_bytes=2**22)
    hint(bell, (1, 2), (1, 3))
    bell.serve(1)
    ring(bell.buffers, 1, [[3, 0]], [[0, INNER]])  # nothing of the second is the host's
    bell.serve(1)
    ring(bell.buffers, 0, [[3, 2]], [[0, 0]])  # another layer's
    bell.serve(1)
    assert bell.prefetched == Prefetched(1, 2 * SLOT, 3, 1)


@pytest.mark.parametrize("gpu_rows", [0, 128])
def test_hints_that_come_and_go_change_no_answer_and_delay_none(gpu_rows: int) -> None:
    """A step that hints wildly and rings in the midst of it."""
    experts = Experts(Scheme("int4", 128))
    bell = host_bell(experts, 1, 1, scales_input=True, prefetch_bytes=2**22, gpu_rows=gpu_rows)
    results: list[torch.Tensor] = []
    over = threading.Event()

    def hints() -> None:
        number = 0
        while not over.is_set():
            number += 1
            hint(bell, (number % 3, number * 7 % (E + 1)) if number % 5 else None)

    def step() -> None:
        for number in range(1, 501):
            ring(bell.buffers, number % LAYERS, [[number % E]], [[gpu_rows]])
            while load_acquire(bell.buffers.control, ANSWERED) != number:
                time.sleep(0)
            results.append(bell.buffers.result.clone())

    threads = [threading.Thread(target=hints), threading.Thread(target=step)]
    for thread in threads:
        thread.start()
    while threads[1].is_alive():
        assert bell.serve(200) == "idle"
    over.set()
    for thread in threads:
        thread.join()
    wanted = [expected(experts, bell, layer, [[e]], [[gpu_rows]], True) for layer in range(LAYERS) for e in range(E)]
    for number, result in enumerate(results, 1):
        assert torch.allclose(result.double(), wanted[number % LAYERS * E + number % E], atol=1e-5)
    assert bell.prefetched.hints > 0 and bell.prefetched.asked == 500
