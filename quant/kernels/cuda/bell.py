"""The step's end of the doorbell (``quant.kernels.cuda.doorbell``): ask the host for what the card leaves to it.

``ring``, then the card's own part, then ``answer``: the host computes meanwhile. Nothing is asked, and
nothing waited for, where all chosen experts are the card's.

Legend: T tokens, k experts per token, H hidden, E experts, inter: expert intermediate size.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant.errors import SchemeError
from quant.kernels.cuda import runtime
from quant.kernels.cuda.doorbell import ANSWERED, HEADER, LOST, RUNG, STOP, BellBuffers, load_acquire, store_release
from quant.kernels.cuda.experts import HOST, VRAM, ChosenExperts

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


def ring(x: Tensor, asked: ChosenExperts, row: int, inter: int, bell: BellBuffers, outlook: Outlook = None) -> None:
    """Open a request of x ``[T, H]`` for MoE layer ``row`` if any chosen expert is, in part, the host's; whether or
    not, say in ``bell.hint`` what ``outlook`` (of one token) expects to be the host's next.

    Of an expert in pinned host memory the host computes intermediate features ``asked.gpu_rows`` onwards, of one
    elsewhere all. Raises SchemeError if the buffers are too small.
    """
    tokens, top_k = asked.chosen.shape
    if tokens * top_k > bell.scores.numel() or x.shape != (tokens, bell.x.shape[1]) or not x.is_contiguous():
        raise SchemeError(
            f"x {tuple(x.shape)} with {top_k} experts per token: the doorbell's buffers are for "
            f"{bell.scores.numel()} experts and hidden size {bell.x.shape[1]}"
        )
    if outlook is not None and (tokens != 1 or bell.hint.numel() < top_k):
        raise SchemeError(f"{tokens} tokens, room for {bell.hint.numel()} of {top_k} experts: expected one")
    run = launch_ring if runtime.on_device(x) else ring_reference
    run(x, asked, row, inter, bell, outlook)


def answer(asked: ChosenExperts, inter: int, bell: BellBuffers, out: Tensor, patience: int = PATIENCE) -> None:
    """Wait for the answer to this layer's request, if there was one, and add it to ``out`` f32 ``[T, H]``.

    A host that says stop, or nothing for ``patience`` looks, makes it add nothing and set the LOST word.
    """
    run = launch_answer if runtime.on_device(out) else answer_reference
    run(asked, inter, bell, out, patience)


def first_features(asked: ChosenExperts, inter: int) -> Tensor:
    """The first intermediate feature of each pair's expert that is the host's, int32 ``[T, k]``; ``inter``
    for none."""
    chosen, gpu_rows = asked.chosen, asked.gpu_rows
    place = asked.places[chosen.clamp(min=0).long()]
    first = torch.where(place == HOST, gpu_rows.clamp(max=inter), torch.zeros_like(gpu_rows))
    return torch.where((place == VRAM) | (chosen < 0), torch.full_like(gpu_rows, inter), first)


def ring_reference(
    x: Tensor, asked: ChosenExperts, row: int, inter: int, bell: BellBuffers, outlook: Outlook = None
) -> None:
    """``ring`` in torch, for a step on the CPU."""
    first = first_features(asked, inter)
    tokens, top_k = asked.chosen.shape
    if not bool((first == inter).all()):
        pairs = tokens * top_k
        bell.request[:HEADER] = torch.tensor([row, tokens, top_k, 0], dtype=torch.int32)
        bell.request[HEADER : HEADER + pairs] = asked.chosen.clamp(min=0).flatten()
        bell.request[HEADER + pairs : HEADER + 2 * pairs] = first.flatten()
        bell.scores.view(-1)[:pairs] = asked.scores.flatten()
        bell.x[:tokens] = x.float()
        bell.sequence.add_(1)
        store_release(bell.control, RUNG, int(bell.sequence))
    if isinstance(outlook, Coming):
        logits = outlook.logits[0].nan_to_num(nan=-3e38)
        best = torch.sort(logits, descending=True, stable=True).indices[:top_k]
        words = 1 + outlook.row * outlook.places.numel() + best
        for rank, word in enumerate(torch.where(outlook.places[best] == VRAM, 0, words).tolist()):
            store_release(bell.hint, rank, word)
    elif outlook is not None:
        for rank in range(top_k):
            store_release(bell.hint, rank, 0)


def answer_reference(asked: ChosenExperts, inter: int, bell: BellBuffers, out: Tensor, patience: int) -> None:
    """``answer`` in torch, for a step on the CPU: lets other Python threads run while it waits."""
    if bool((first_features(asked, inter) == inter).all()):
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
    x: Tensor, asked: ChosenExperts, row: int, inter: int, bell: BellBuffers, outlook: Outlook = None
) -> None:
    """``ring`` by its Triton kernel. A pointer that it does not use is that of ``scores`` or ``places``."""
    import triton

    from quant.kernels.cuda.device import bell as device

    (tokens, top_k), experts = asked.chosen.shape, asked.places.numel()
    coming = outlook if isinstance(outlook, Coming) else Coming(0, asked.scores, asked.places)
    tables = (asked.chosen, asked.scores, asked.places, asked.gpu_rows)
    buffers = (bell.control, bell.request, bell.scores, bell.x, bell.sequence)
    tensors = (x, *tables, *buffers, coming.logits, coming.places, bell.hint)
    sizes = (inter, tokens, top_k, x.shape[1], experts)
    constants = {
        "PAIRS": triton.next_power_of_2(tokens * top_k),
        "GUESS": 0 if outlook is None else 1 if isinstance(outlook, Coming) else 2,
        "TOP_K": top_k,
        "WIDE": triton.next_power_of_2(experts),
    }
    device.ring_kernel[(1,)](*tensors, coming.row, row, *sizes, **constants, **_options())


def launch_answer(asked: ChosenExperts, inter: int, bell: BellBuffers, out: Tensor, patience: int) -> None:
    """``answer`` by its Triton kernel."""
    import triton

    from quant.kernels.cuda.device import bell as device

    (tokens, top_k), features = asked.chosen.shape, out.shape[1]
    tables, buffers = (asked.chosen, asked.places, asked.gpu_rows), (bell.control, bell.result, bell.sequence)
    pairs = triton.next_power_of_2(tokens * top_k)
    sizes = (inter, tokens, top_k, features, patience)
    device.answer_kernel[(1,)](*tables, *buffers, out, *sizes, PAIRS=pairs, **_options())


def _options() -> dict[str, Any]:
    return {"NATIVE": not runtime.interpreted(), "num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
