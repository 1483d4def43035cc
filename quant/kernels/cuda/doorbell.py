"""The doorbell between a decode step on a GPU and the CPU that computes what the step misses.

The buffers lie in pinned host memory, which a GPU addresses as it is. The step writes a request (which
experts, from which intermediate feature on, their scores, the token's activations) and rings;
``HostBell.serve`` computes it with the native kernels and answers. One request is open at a time, and every
control word has one writer.

Legend: T tokens, k experts per token, H hidden, I expert intermediate size, E experts, L MoE layers.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quant.errors import MachineError, SchemeError
from quant.kernels.library import I32, I64, Pointer, addresses, call, fields, library
from quant.kernels.moe import GatedMlp
from quant.kernels.weight import CWeight
from quant.scheme import PACKED

# Words of ``BellBuffers.control``, each on a cache line of its own.
RUNG, ANSWERED, STOP, LOST = 0, 32, 64, 96
HEADER = 4  # words of a request before its experts
_COUNTS = 4  # of ``Prefetched``
# Microseconds that the kernels' threads look for work after a request beside a GPU: longer than between two
# tokens. On a CPU the step itself needs their cores.
_AWAKE = 3000
BellState = Literal["idle", "missing", "stopped"]
_STATES: tuple[BellState, ...] = ("idle", "missing", "stopped")


def store_release(control: Tensor, word: int, value: int) -> None:
    """Write a control word; whoever reads it with acquire sees all that was written before."""
    library().cs_bell_store(Pointer(control.data_ptr()), I64(word), I32(value))


def load_acquire(control: Tensor, word: int) -> int:
    """Read a control word."""
    return int(library().cs_bell_load(Pointer(control.data_ptr()), I64(word)))


@dataclass(frozen=True)
class BellBuffers:
    """What both sides see. All but ``sequence`` lie in host memory, pinned if the step runs on a GPU.

    ``control`` int32 ``[128]``: RUNG is the number of the last request, written by the step; ANSWERED that of
    the last answer, written by the host; STOP, written by the host, makes the step wait for no answer; LOST
    is written by a step that gave up waiting. ``request`` int32 ``[4 + 2·T·k]``: MoE layer, T, k, 0, the
    experts ``[T, k]``, then the first intermediate feature ``[T, k]`` that the host computes (I: none).
    ``scores`` f32 ``[T, k]``, ``x`` and ``result`` f32 ``[T, H]``. ``sequence`` int32 ``[1]`` counts the
    requests and lies on the device. ``hint`` int32 ``[k]``, written by the step at will: 1 + layer · E +
    expert for what a coming layer will probably ask of the host, 0 for nothing.
    """

    control: Tensor
    request: Tensor
    scores: Tensor
    x: Tensor
    result: Tensor
    sequence: Tensor
    hint: Tensor

    @classmethod
    def allocate(cls, tokens: int, top_k: int, hidden: int, device: torch.device) -> "BellBuffers":
        """Buffers for steps of up to ``tokens`` tokens on ``device``.

        Raises MachineError if they cannot be pinned.
        """
        pin = device.type == "cuda"
        try:
            return cls(
                torch.zeros(128, dtype=torch.int32, pin_memory=pin),
                torch.zeros(HEADER + 2 * tokens * top_k, dtype=torch.int32, pin_memory=pin),
                torch.zeros(tokens, top_k, pin_memory=pin),
                torch.zeros(tokens, hidden, pin_memory=pin),
                torch.zeros(tokens, hidden, pin_memory=pin),
                torch.zeros(1, dtype=torch.int32, device=device),
                torch.zeros(top_k, dtype=torch.int32, pin_memory=pin),
            )
        except RuntimeError as error:
            raise MachineError(
                f"cannot pin {8 * tokens * hidden + 512} bytes of host memory for the GPU's doorbell "
                f"({str(error).splitlines()[0]}): use --no-graph"
            ) from None


@dataclass(frozen=True)
class DoorbellRequest:
    """An open request: MoE layer ``layer`` (its row in the table) wants ``experts`` from the host."""

    layer: int
    experts: tuple[int, ...]


class _CBellLayer(ctypes.Structure):
    _fields_ = fields((CWeight, "gate up down"), (I64 * 6, "offsets"))


class _CBell(ctypes.Structure):
    _fields_ = fields(
        (Pointer, "control request scores x result addresses"),
        (I64, "layers experts pairs"),
        (ctypes.POINTER(_CBellLayer), "stored"),
        (I32, "scales_input exact keep_awake"),
        (Pointer, "hint"),
        (I64, "guesses prefetch_bytes gpu_rows"),
        (Pointer, "prefetched"),
    )


@dataclass(frozen=True)
class Prefetched:
    """What reading ahead into the CPU's caches came to: ``hints`` followed, ``nbytes`` read for them; of
    ``asked`` experts, ``foreseen`` were those of the hint that was followed last."""

    hints: int
    nbytes: int
    asked: int
    foreseen: int


def first_byte(expert: GatedMlp) -> int:
    """Where an expert's bytes begin: the least address of its tensors."""
    return min(expert.pointers)


def offsets(expert: GatedMlp) -> tuple[int, ...]:
    """Where each of the six tensors lies from the expert's first byte on."""
    base = first_byte(expert)
    return tuple(pointer - base for pointer in expert.pointers)


class HostBell:
    """The host's end. ``samples`` has one expert per MoE layer, stored like all others of the layer: int4 or
    int8, the tensors at the same offsets.

    ``table`` int64 ``[L, E]`` says where each expert's first byte lies in host memory, 0 if it is not there.
    It belongs to the caller, who may clear the entry of an expert that the open request asks for only where
    its bytes stay.

    While nothing is asked, up to ``prefetch_bytes`` (0: none) of what ``buffers.hint`` names are read into the
    CPU's caches, if the table has it, from intermediate feature ``gpu_rows`` on. Raises
    SchemeError for experts in another form.
    """

    def __init__(
        self,
        buffers: BellBuffers,
        samples: Sequence[GatedMlp],
        table: Tensor,
        *,
        scales_input: bool,
        exact: bool,
        prefetch_bytes: int = 0,
        gpu_rows: int = 0,
    ) -> None:
        layers, hidden = len(samples), buffers.x.shape[1]
        assert table.dtype == torch.int64 and table.shape[0] == layers and table.is_contiguous()
        self.buffers, self.table = buffers, table
        self._prefetched = torch.zeros(_COUNTS + buffers.hint.numel(), dtype=torch.int64)
        self._features = samples[0].gate_proj.out_features
        self._stored = (_CBellLayer * layers)()
        for stored, sample in zip(self._stored, samples, strict=True):
            if any(weight.kind not in PACKED.values() for weight in sample.weights):
                kinds = ", ".join(weight.kind for weight in sample.weights)
                raise SchemeError(f"experts in {kinds}: the doorbell serves int2 to int8")
            if (sample.gate_proj.out_features, sample.gate_proj.in_features) != (self._features, hidden):
                raise SchemeError(f"experts of {sample.shapes}: expected hidden size {hidden} in every layer")
            stored.gate, stored.up, stored.down = sample.native
            stored.offsets[:] = offsets(sample)
        shared = {name: getattr(buffers, name) for name in ("control", "request", "scores", "x", "result", "hint")}
        tensors = addresses(**shared, addresses=self.table, prefetched=self._prefetched)
        self._bell = bell = _CBell(stored=self._stored, **tensors)
        (bell.layers, bell.experts), bell.pairs = table.shape, buffers.scores.numel()
        bell.scales_input, bell.exact, bell.keep_awake = scales_input, exact, _AWAKE if buffers.sequence.is_cuda else 0
        bell.guesses, bell.prefetch_bytes, bell.gpu_rows = buffers.hint.numel(), prefetch_bytes, gpu_rows

    def serve(self, microseconds: int) -> BellState:
        """Compute and answer what is asked for that long. "missing" leaves a request open that names an
        expert which is not in the table; "stopped" says that the stop word is set.

        Other Python threads run meanwhile. Raises MachineError for a request that makes no sense.
        """
        state = I32(0)
        call("bell_serve", self._bell, microseconds, ctypes.byref(state))
        return _STATES[state.value]

    @property
    def prefetch_bytes(self) -> int:
        """What is read ahead at most; may be set while nobody serves."""
        return int(self._bell.prefetch_bytes)

    @prefetch_bytes.setter
    def prefetch_bytes(self, nbytes: int) -> None:
        self._bell.prefetch_bytes = nbytes

    @property
    def prefetched(self) -> Prefetched:
        """Since the beginning."""
        return Prefetched(*self._prefetched[:_COUNTS].tolist())

    def request(self) -> DoorbellRequest:
        """The open request."""
        words = self.buffers.request.tolist()
        pairs = words[1] * words[2]
        ids, first = words[HEADER : HEADER + pairs], words[HEADER + pairs : HEADER + 2 * pairs]
        wanted = {expert for expert, row in zip(ids, first, strict=True) if row < self._features}
        return DoorbellRequest(words[0], tuple(sorted(wanted)))

    def begin(self) -> None:
        """Start the open request's result at zero."""
        call("bell_begin", self._bell)

    def add(self, expert: int, first_byte: int) -> None:
        """Add what the open request asks of ``expert``, whose bytes begin at ``first_byte``."""
        call("bell_add", self._bell, I32(expert), first_byte)

    def answer(self) -> None:
        """Answer the open request with what was added, or, after ``stop``, let go of it."""
        store_release(self.buffers.control, ANSWERED, load_acquire(self.buffers.control, RUNG))

    def stop(self) -> None:
        """Make the step wait for no answer: what it computes from here on means nothing."""
        store_release(self.buffers.control, STOP, 1)

    def rearm(self) -> None:
        """Serve again after ``stop``, once the step has ended."""
        self.answer()
        store_release(self.buffers.control, LOST, 0)
        store_release(self.buffers.control, STOP, 0)

    @property
    def lost(self) -> bool:
        """Whether the step gave up waiting for an answer."""
        return load_acquire(self.buffers.control, LOST) != 0
