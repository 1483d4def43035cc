"""The step's end of the doorbell (``quant.kernels.doorbell``): ask the host for what the card leaves to it.

``ring``, then the card's own part, then ``answer``: the host computes meanwhile. Nothing is asked, and
nothing waited for, where all chosen experts are the card's.

Legend: T tokens, k experts per token, H hidden, E experts, inter: expert intermediate size.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.errors import SchemeError
from quant.kernels.cuda import runtime
from quant.kernels.cuda.experts import HOST, VRAM
from quant.kernels.doorbell import ANSWERED, LOST, RUNG, STOP, BellBuffers, load_acquire, store_release

_HEADER = 4  # words of a request before its experts
_BLOCK = 4096
PATIENCE = 1 << 26  # looks at the flag before a step gives up: a minute or more at one PCIe round trip each


@dataclass(frozen=True)
class Coming:
    """What is known of the MoE layer after the one that rings, its row in the tables ``row``: ``logits`` f32
    ``[1, E]``, its router on the present hidden state, and ``places`` uint8 ``[E]`` of its experts."""

    row: int
    logits: Tensor
    places: Tensor


@dataclass(frozen=True)
class Nothing:
    """The last MoE layer rings: what was said of coming ones is over."""


Outlook = Coming | Nothing | None


def ring(
    x: Tensor,
    chosen: Tensor,
    scores: Tensor,
    places: Tensor,
    share: Tensor,
    row: int,
    inter: int,
    bell: BellBuffers,
    outlook: Outlook = None,
) -> None:
    """Open a request for MoE layer ``row`` if any chosen expert is, in part, the host's; whether or not, say
    in ``bell.hint`` what ``outlook`` (of one token) expects to be the host's next.

    x ``[T, H]``, chosen int32 ``[T, k]`` (-1: none), scores f32 ``[T, k]``, places uint8 ``[E]``, share int32
    ``[1]``: of an expert in pinned host memory (place 1) the host computes intermediate features ``share``
    onwards, of one elsewhere (2) all. Raises SchemeError if the buffers are too small.
    """
    tokens, top_k = chosen.shape
    if tokens * top_k > bell.scores.numel() or x.shape != (tokens, bell.x.shape[1]) or not x.is_contiguous():
        raise SchemeError(
            f"x {tuple(x.shape)} with {top_k} experts per token: the doorbell's buffers are for "
            f"{bell.scores.numel()} experts and hidden size {bell.x.shape[1]}"
        )
    if outlook is not None and (tokens != 1 or bell.hint.numel() < top_k):
        raise SchemeError(f"{tokens} tokens, room for {bell.hint.numel()} of {top_k} experts: expected one")
    if runtime.on_device(x):
        launch_ring(x, chosen, scores, places, share, row, inter, bell, outlook)
    else:
        reference_ring(x, chosen, scores, places, share, row, inter, bell, outlook)


def answer(
    chosen: Tensor, places: Tensor, share: Tensor, inter: int, bell: BellBuffers, out: Tensor, patience: int = PATIENCE
) -> None:
    """Wait for the answer to this layer's request, if there was one, and add it to ``out`` f32 ``[T, H]``.

    A host that says stop, or nothing for ``patience`` looks, makes it add nothing and set the LOST word.
    """
    if runtime.on_device(out):
        launch_answer(chosen, places, share, inter, bell, out, patience)
    else:
        reference_answer(chosen, places, share, inter, bell, out, patience)


def first_features(chosen: Tensor, places: Tensor, share: Tensor, inter: int) -> Tensor:
    """The first intermediate feature of each pair's expert that is the host's, int32 ``[T, k]``; ``inter``
    for none."""
    place = places[chosen.clamp(min=0).long()]
    first = torch.where(place == HOST, share.clamp(max=inter), torch.zeros_like(share))
    return torch.where((place == VRAM) | (chosen < 0), torch.full_like(share, inter), first)


def reference_ring(
    x: Tensor,
    chosen: Tensor,
    scores: Tensor,
    places: Tensor,
    share: Tensor,
    row: int,
    inter: int,
    bell: BellBuffers,
    outlook: Outlook = None,
) -> None:
    """``ring`` in torch, for a step on the CPU."""
    first = first_features(chosen, places, share, inter)
    if not bool((first == inter).all()):
        tokens, top_k = chosen.shape
        pairs = tokens * top_k
        bell.request[:_HEADER] = torch.tensor([row, tokens, top_k, 0], dtype=torch.int32)
        bell.request[_HEADER : _HEADER + pairs] = chosen.clamp(min=0).flatten()
        bell.request[_HEADER + pairs : _HEADER + 2 * pairs] = first.flatten()
        bell.scores.view(-1)[:pairs] = scores.flatten()
        bell.x[:tokens] = x.float()
        bell.sequence.add_(1)
        store_release(bell.control, RUNG, int(bell.sequence))
    if isinstance(outlook, Coming):
        logits = outlook.logits[0].nan_to_num(nan=-3e38)
        best = torch.sort(logits, descending=True, stable=True).indices[: chosen.shape[1]]
        words = 1 + outlook.row * outlook.places.numel() + best
        for rank, word in enumerate(torch.where(outlook.places[best] == VRAM, 0, words).tolist()):
            store_release(bell.hint, rank, word)
    elif outlook is not None:
        for rank in range(chosen.shape[1]):
            store_release(bell.hint, rank, 0)


def reference_answer(
    chosen: Tensor, places: Tensor, share: Tensor, inter: int, bell: BellBuffers, out: Tensor, patience: int
) -> None:
    """``answer`` in torch, for a step on the CPU: lets other Python threads run while it waits."""
    if bool((first_features(chosen, places, share, inter) == inter).all()):
        return
    number, control = int(bell.sequence), bell.control
    looks = patience if load_acquire(control, LOST) else 0
    while (seen := load_acquire(control, ANSWERED)) != number and looks < patience:
        if load_acquire(control, STOP):
            break
        looks += 1
        time.sleep(0)
    if seen == number:
        out += bell.result[: out.shape[0]]
    else:
        store_release(control, LOST, number)


def launch_ring(
    x: Tensor,
    chosen: Tensor,
    scores: Tensor,
    places: Tensor,
    share: Tensor,
    row: int,
    inter: int,
    bell: BellBuffers,
    outlook: Outlook = None,
) -> None:
    """``ring`` by its Triton kernel. A pointer that it does not use is that of ``scores`` or ``places``."""
    import triton

    from quant.kernels.cuda.device import bell as device

    (tokens, top_k), experts = chosen.shape, places.numel()
    coming = outlook if isinstance(outlook, Coming) else Coming(0, scores, places)
    device.ring_kernel[(1,)](
        x,
        chosen,
        scores,
        places,
        share,
        bell.control,
        bell.request,
        bell.scores,
        bell.x,
        bell.sequence,
        coming.logits,
        coming.places,
        bell.hint,
        coming.row,
        row,
        inter,
        tokens,
        top_k,
        x.shape[1],
        experts,
        PAIRS=triton.next_power_of_2(tokens * top_k),
        RUNG=RUNG,
        HEADER=_HEADER,
        BLOCK=_BLOCK,
        GUESS=0 if outlook is None else 1 if isinstance(outlook, Coming) else 2,
        TOP_K=top_k,
        WIDE=triton.next_power_of_2(experts),
        NATIVE=not runtime.interpreted(),
        num_warps=4,
        num_stages=1,
        enable_fp_fusion=True,
    )


def launch_answer(
    chosen: Tensor, places: Tensor, share: Tensor, inter: int, bell: BellBuffers, out: Tensor, patience: int
) -> None:
    """``answer`` by its Triton kernel."""
    import triton

    from quant.kernels.cuda.device import bell as device

    tokens, top_k = chosen.shape
    device.answer_kernel[(1,)](
        chosen,
        places,
        share,
        bell.control,
        bell.result,
        bell.sequence,
        out,
        inter,
        tokens,
        top_k,
        out.shape[1],
        patience,
        PAIRS=triton.next_power_of_2(tokens * top_k),
        ANSWERED=ANSWERED,
        STOP=STOP,
        LOST=LOST,
        BLOCK=_BLOCK,
        NATIVE=not runtime.interpreted(),
        num_warps=4,
        num_stages=1,
        enable_fp_fusion=True,
    )
