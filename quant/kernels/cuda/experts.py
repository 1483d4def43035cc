"""The routed experts of up to eight tokens, read where they lie: VRAM, or pinned host memory in place.

Which experts, where they are and how much of each is this card's is all read on the device, so the call never
waits for the host and may sit in a CUDA graph: its grid is fixed, programs with nothing to do end at once.

Legend: T tokens, k experts per token, H hidden, I expert intermediate size, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from quant.errors import SchemeError
from quant.kernels.cuda import runtime
from quant.kernels.cuda.layout import ExpertLayout

MAX_TOKENS = 8
VRAM, HOST, ELSEWHERE = 0, 1, 2  # values of ``places``
# A tile of 16 rows × 128 words on 8 warps: two rows per warp; 2 (gate and up) or 4 programs per SM.
ROWS, WORDS = 16, 128
OPTIONS = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": True}


@dataclass(frozen=True)
class ChosenExperts:
    """What T tokens chose in one layer, and where the layer's experts are.

    ``chosen`` int32 ``[T, k]`` (-1: none) and ``scores`` f32 ``[T, k]``; ``addresses`` int64 ``[E]`` and ``places``
    uint8 ``[E]``: VRAM, HOST (pinned memory, which the card reads in place) or ELSEWHERE. ``gpu_rows`` int32 ``[1]``
    (a multiple of 32 and of down_proj's group): of an expert in VRAM the card computes all I intermediate features,
    of one in pinned memory the first ``gpu_rows``, of others none. ``scales_input``: a score multiplies the
    expert's input (Llama 4), else its output.
    """

    chosen: Tensor
    scores: Tensor
    addresses: Tensor
    places: Tensor
    gpu_rows: Tensor
    scales_input: bool


@dataclass(frozen=True)
class DecodeScratch:
    """What lies between the two halves of an expert: bf16 ``[T·k, I]``. One serves all layers."""

    hidden: Tensor

    @classmethod
    def allocate(cls, layout: ExpertLayout, tokens: int, pairs: int, device: torch.device) -> "DecodeScratch":
        """Scratch for up to ``tokens`` tokens that choose ``pairs`` experts in all."""
        if not 1 <= tokens <= MAX_TOKENS or pairs < tokens:
            raise SchemeError(
                f"{tokens} tokens with {pairs} experts: expected 1 to {MAX_TOKENS} tokens with one or more"
            )
        return cls(torch.zeros(pairs, layout.inter, dtype=torch.bfloat16, device=device))


def moe_decode(x: Tensor, asked: ChosenExperts, layout: ExpertLayout, scratch: DecodeScratch, out: Tensor) -> None:
    """Add to ``out`` f32 ``[T, H]`` what this card computes of the experts that x bf16 ``[T, H]`` (the reference also
    takes f32) chose. Raises SchemeError for other shapes."""
    _check(x, asked, layout, scratch, out)
    if runtime.on_device(x):
        launch_experts(x, asked, layout, scratch, out)
    else:
        experts_reference(x, asked, layout, out)


def experts_reference(x: Tensor, asked: ChosenExperts, layout: ExpertLayout, out: Tensor) -> None:
    """``moe_decode`` in torch, in f32, on experts in host memory."""
    addresses, places = asked.addresses, asked.places
    limits = {VRAM: layout.inter, HOST: int(asked.gpu_rows)}
    for token, experts in enumerate(asked.chosen.tolist()):
        for choice, expert in enumerate(experts):
            if expert < 0 or int(addresses[expert]) == 0:
                continue
            count = limits.get(int(places[expert]), 0)
            if not count:
                continue
            gate, up, down = layout.dense(int(addresses[expert]), torch.float32)
            score = asked.scores[token, choice].float()
            inputs = x[token].float()
            if asked.scales_input:
                inputs = inputs * score
            hidden = silu(linear(inputs, gate[:count])) * linear(inputs, up[:count])
            y = linear(hidden.to(x.dtype).float(), down[:, :count])
            out[token] += y if asked.scales_input else y * score


def launch_experts(x: Tensor, asked: ChosenExperts, layout: ExpertLayout, scratch: DecodeScratch, out: Tensor) -> None:
    """``moe_decode`` by the two Triton kernels."""
    import triton

    from quant.kernels.cuda.device import gemv

    if x.dtype != torch.bfloat16:
        raise SchemeError(f"activations are {x.dtype}: the CUDA kernels take bf16 (--exact runs on the CPU)")
    tokens, top_k = asked.chosen.shape
    tables = (asked.chosen, asked.scores, asked.addresses, asked.places, asked.gpu_rows)
    common = {"TOP_K": top_k, "SCALES_INPUT": asked.scales_input, "ALIGNMENT": layout.alignment, **OPTIONS}
    forms = [
        gemv.Rows(scheme.bits, scheme.group_size, ROWS, words_at_once(scheme.bits))
        for scheme in (layout.gate_up, layout.down)
    ]
    sizes = (layout.hidden, layout.inter, *layout.gate_up_row, *layout.offsets[:4])
    gemv.gate_up_kernel[(tokens * top_k, -(-layout.inter // ROWS))](
        x, *tables, scratch.hidden, *sizes, FORM=forms[0], **common
    )
    sizes = (layout.hidden, layout.inter, *layout.down_row, *layout.offsets[4:])
    choices = triton.next_power_of_2(top_k)
    gemv.down_kernel[(tokens, -(-layout.hidden // ROWS))](
        scratch.hidden, *tables, out, *sizes, CHOICES=choices, FORM=forms[1], **common
    )


def words_at_once(bits: int) -> int:
    """Words of a row that a step takes; at 3 bits threes of them, with 32 weights each to hold in registers."""
    return WORDS // 4 if bits == 3 else WORDS


def _check(x: Tensor, asked: ChosenExperts, layout: ExpertLayout, scratch: DecodeScratch, out: Tensor) -> None:
    tokens, top_k = asked.chosen.shape
    experts = tuple(asked.addresses.shape[-1:])
    expected = {
        "x": (x, (tokens, layout.hidden), None),
        "chosen": (asked.chosen, (tokens, top_k), torch.int32),
        "scores": (asked.scores, (tokens, top_k), torch.float32),
        "addresses": (asked.addresses, experts, torch.int64),
        "places": (asked.places, experts, torch.uint8),
        "out": (out, (tokens, layout.hidden), torch.float32),
    }
    for name, (tensor, shape, dtype) in expected.items():
        if tuple(tensor.shape) != shape or dtype not in (None, tensor.dtype) or not tensor.is_contiguous():
            raise SchemeError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}: expected {dtype or 'floats'} {shape}, contiguous"
            )
    if tokens > MAX_TOKENS or tokens * top_k > scratch.hidden.shape[0]:
        raise SchemeError(
            f"{tokens} tokens with {top_k} experts each: expected at most {MAX_TOKENS} tokens and "
            f"{scratch.hidden.shape[0]} experts in all"
        )
