"""The routed experts of many tokens: one grouped product per half of an expert, over the experts at hand.

Tokens are sorted by expert once per layer. Experts may then come in any number of calls, as their bytes
arrive: each call computes the tokens of its experts and fills rows of the output that no other call touches.

Legend: T tokens, k experts per token, pair = token·k + choice, H hidden, I expert intermediate size,
E experts, P experts of a call.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from quant.errors import SchemeError
from quant.kernels.cuda import runtime
from quant.kernels.cuda.layout import ExpertLayout
from quant.kernels.cuda.linear import arrange, arranged_width

_ROWS, _TOKENS, _WARPS, _STAGES = 128, 64, 8, 3
_EXPERTS = 16  # a call's experts are looked through in a power of two, at least this: fewer kernels to compile


@dataclass(frozen=True)
class TokenGroups:
    """The pairs sorted by expert, within an expert by token: ``order`` int32 ``[T·k]`` holds pairs, those of
    expert e from ``starts[e]`` to ``starts[e + 1]``, int32 ``[E + 1]``."""

    order: Tensor
    starts: Tensor


def group_tokens(chosen: Tensor, num_experts: int) -> TokenGroups:
    """The groups of chosen ``[T, k]``, computed where ``chosen`` lies, without waiting for it."""
    experts, order = torch.sort(chosen.reshape(-1).to(torch.int64), stable=True)
    bounds = torch.arange(num_experts + 1, device=chosen.device)
    return TokenGroups(order.to(torch.int32), torch.searchsorted(experts, bounds).to(torch.int32))


@dataclass(frozen=True)
class PrefillScratch:
    """What lies between the steps, a row per pair in sorted order: the arranged ``tokens`` and the experts'
    ``hidden`` activations, bf16, padded to whole blocks. One serves all layers with experts of one size."""

    tokens: Tensor
    hidden: Tensor

    @classmethod
    def allocate(cls, layout: ExpertLayout, pairs: int, device: torch.device) -> "PrefillScratch":
        """Scratch for up to ``pairs`` = T·k pairs."""
        widths = arranged_width(layout.hidden), arranged_width(layout.inter)
        made = [torch.zeros(pairs, width, dtype=torch.bfloat16, device=device) for width in widths]
        return cls(*made)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.tokens.nbytes + self.hidden.nbytes


def arrange_tokens(
    x: Tensor,
    groups: TokenGroups,
    scores: Tensor,
    layout: ExpertLayout,
    scratch: PrefillScratch,
    *,
    scales_input: bool,
    top_k: int,
) -> None:
    """Put x ``[T, H]`` into ``scratch``, a row per pair, sorted; times its score if ``scales_input``.

    Once per layer, before the calls of ``moe_prefill``.
    """
    pairs = groups.order.shape[0]
    if x.shape != (pairs // top_k, layout.hidden) or pairs > scratch.tokens.shape[0]:
        raise SchemeError(
            f"x is {tuple(x.shape)} with {pairs} pairs: expected [{pairs // top_k}, {layout.hidden}], at "
            f"most {scratch.tokens.shape[0]} pairs"
        )
    if runtime.on_device(x):
        launch_arrange(x, groups, scores, layout, scratch, scales_input=scales_input, top_k=top_k)
        return
    order = groups.order.long()
    rows = x[order // top_k].float()
    if scales_input:
        rows = rows * scores.reshape(-1, 1)[order].float()
    scratch.tokens[:pairs, : layout.hidden] = rows.to(scratch.tokens.dtype)


def launch_arrange(
    x: Tensor,
    groups: TokenGroups,
    scores: Tensor,
    layout: ExpertLayout,
    scratch: PrefillScratch,
    *,
    scales_input: bool,
    top_k: int,
) -> None:
    """``arrange_tokens`` by its Triton kernel."""
    rows = scratch.tokens[: groups.order.shape[0]]
    factors = scores if scales_input else None
    arrange(x.contiguous(), groups.order, factors, rows, layout.gate_up.bits, top_k)


def moe_prefill(
    groups: TokenGroups,
    scores: Tensor,
    experts: Tensor,
    addresses: Tensor,
    layout: ExpertLayout,
    scratch: PrefillScratch,
    out: Tensor,
    *,
    scales_input: bool,
) -> None:
    """Fill the rows of ``out`` ``[T·k, H]`` (by pair, bf16) whose expert is among ``experts`` int32 ``[P]``.

    ``addresses`` int64 ``[E]``; an expert at address 0 is skipped, and its rows are left as they are. Scores
    f32 ``[T, k]`` multiply the result unless ``scales_input`` (``arrange_tokens`` then has applied them).
    """
    if out.shape != (groups.order.shape[0], layout.hidden) or not out.is_contiguous():
        raise SchemeError(f"out is {tuple(out.shape)}: expected {(groups.order.shape[0], layout.hidden)}, contiguous")
    widths = arranged_width(layout.hidden), arranged_width(layout.inter)
    if widths != (scratch.tokens.shape[1], scratch.hidden.shape[1]):
        raise SchemeError(
            f"scratch for {scratch.tokens.shape[1]} and {scratch.hidden.shape[1]} features: expected {widths}"
        )
    if runtime.on_device(out):
        launch(groups, scores, experts, addresses, layout, scratch, out, scales_input=scales_input)
    else:
        reference(groups, scores, experts, addresses, layout, scratch, out, scales_input=scales_input)


def reference(
    groups: TokenGroups,
    scores: Tensor,
    experts: Tensor,
    addresses: Tensor,
    layout: ExpertLayout,
    scratch: PrefillScratch,
    out: Tensor,
    *,
    scales_input: bool,
) -> None:
    """``moe_prefill`` in torch, in f32, on experts in host memory; its tokens are not arranged."""
    starts = groups.starts.tolist()
    for expert in experts.tolist():
        first, end, address = starts[expert], starts[expert + 1], int(addresses[expert])
        if first == end or address == 0:
            continue
        gate, up, down = layout.dense(address, torch.float32)
        x = scratch.tokens[first:end, : layout.hidden].float()
        hidden = (silu(linear(x, gate)) * linear(x, up)).to(scratch.hidden.dtype)
        y = linear(hidden.float(), down)
        pairs = groups.order[first:end].long()
        out[pairs] = (y if scales_input else y * scores.reshape(-1, 1)[pairs].float()).to(out.dtype)


def launch(
    groups: TokenGroups,
    scores: Tensor,
    experts: Tensor,
    addresses: Tensor,
    layout: ExpertLayout,
    scratch: PrefillScratch,
    out: Tensor,
    *,
    scales_input: bool,
) -> None:
    """``moe_prefill`` by two Triton kernels. Their grids hold as many tiles as these tokens could need, since
    the host does not know how they fell; the tiles too many end at once."""
    import triton

    from quant.kernels.cuda.device import gemm

    if out.dtype != torch.bfloat16:
        raise SchemeError(f"out is {out.dtype}: the CUDA kernels write bf16 (--exact runs on the CPU)")
    pairs, count = groups.order.shape[0], experts.shape[0]
    tiles = -(-pairs // _TOKENS) + min(count, pairs)
    gate_up, down = layout.gate_up, layout.down
    sizes = {
        "EXPERTS": max(_EXPERTS, triton.next_power_of_2(count)),
        "ROWS": _ROWS,
        "TOKENS": _TOKENS,
        "STAGES": _STAGES,
    }
    options = {"num_warps": _WARPS, "num_stages": _STAGES, "enable_fp_fusion": True}
    hidden_width = scratch.hidden.shape[1]
    gemm.gate_up_kernel[(tiles, -(-hidden_width // _ROWS))](
        scratch.tokens,
        experts,
        groups.starts,
        addresses,
        scratch.hidden,
        count,
        layout.hidden,
        layout.inter,
        layout.hidden * gate_up.bits // 32,
        layout.hidden // gate_up.group_size,
        scratch.tokens.shape[1],
        hidden_width,
        layout.gate_packed,
        layout.gate_scale,
        layout.up_packed,
        layout.up_scale,
        BITS=gate_up.bits,
        GROUP=gate_up.group_size,
        DOWN_BITS=down.bits,
        ALIGNMENT=layout.alignment,
        OPERAND=runtime.operand(),
        **sizes,
        **options,
    )
    gemm.down_kernel[(tiles, -(-layout.hidden // _ROWS))](
        scratch.hidden,
        groups.order,
        scores,
        experts,
        groups.starts,
        addresses,
        out,
        count,
        layout.hidden,
        layout.inter * down.bits // 32,
        layout.inter // down.group_size,
        hidden_width,
        layout.down_packed,
        layout.down_scale,
        SCALES_OUTPUT=not scales_input,
        BITS=down.bits,
        GROUP=down.group_size,
        ALIGNMENT=layout.alignment,
        OPERAND=runtime.operand(),
        **sizes,
        **options,
    )


def combine(out: Tensor, top_k: int) -> Tensor:
    """The sum of each token's pairs ``[T·k, H]`` → ``[T, H]``, in the router's order."""
    return out if top_k == 1 else out.view(-1, top_k, out.shape[1]).sum(1)
