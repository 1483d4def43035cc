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
from quant.kernels.cuda.linear import arrange, arranged_width, tile_sizes

_MANY = 1 << 30  # tokens: a prompt's
_WARPS = tile_sizes(_MANY, 4)[2]
_EXPERTS = 16  # a call's experts are looked through in a power of two, at least this: fewer kernels to compile


@dataclass(frozen=True)
class TokenGroups:
    """The pairs sorted by expert, within an expert by token: ``order`` int32 ``[T·k]`` holds pairs, those of
    expert e from ``starts[e]`` to ``starts[e + 1]``, int32 ``[E + 1]``.

    ``scores`` f32 ``[T, k]`` multiply an expert's input where ``scales_input``, else its output.
    """

    order: Tensor
    starts: Tensor
    scores: Tensor
    scales_input: bool

    @property
    def top_k(self) -> int:
        """Experts per token."""
        return self.scores.shape[1]


def group_tokens(chosen: Tensor, scores: Tensor, num_experts: int, *, scales_input: bool) -> TokenGroups:
    """The groups of chosen ``[T, k]``, computed where ``chosen`` lies, without waiting for it."""
    experts, order = torch.sort(chosen.reshape(-1).to(torch.int64), stable=True)
    bounds = torch.arange(num_experts + 1, device=chosen.device)
    starts = torch.searchsorted(experts, bounds).to(torch.int32)
    return TokenGroups(order.to(torch.int32), starts, scores, scales_input)


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


def arrange_tokens(x: Tensor, groups: TokenGroups, layout: ExpertLayout, scratch: PrefillScratch) -> None:
    """Put x ``[T, H]`` into ``scratch``, a row per pair, sorted; times its score where scores scale inputs.

    Once per layer, before the calls of ``moe_prefill``.
    """
    pairs, top_k = groups.order.shape[0], groups.top_k
    if x.shape != (pairs // top_k, layout.hidden) or pairs > scratch.tokens.shape[0]:
        raise SchemeError(
            f"x is {tuple(x.shape)} with {pairs} pairs: expected [{pairs // top_k}, {layout.hidden}], at "
            f"most {scratch.tokens.shape[0]} pairs"
        )
    if runtime.on_device(x):
        launch_arrange(x, groups, layout, scratch)
        return
    order = groups.order.long()
    rows = x[order // top_k].float()
    if groups.scales_input:
        rows = rows * groups.scores.reshape(-1, 1)[order].float()
    scratch.tokens[:pairs, : layout.hidden] = rows.to(scratch.tokens.dtype)


def launch_arrange(x: Tensor, groups: TokenGroups, layout: ExpertLayout, scratch: PrefillScratch) -> None:
    """``arrange_tokens`` by its Triton kernel."""
    rows = scratch.tokens[: groups.order.shape[0]]
    factors = groups.scores if groups.scales_input else None
    arrange(x.contiguous(), groups.order, factors, rows, layout.gate_up.bits, groups.top_k)


def moe_prefill(
    groups: TokenGroups, experts: Tensor, addresses: Tensor, layout: ExpertLayout, scratch: PrefillScratch, out: Tensor
) -> None:
    """Fill the rows of ``out`` ``[T·k, H]`` (by pair, bf16) whose expert is among ``experts`` int32 ``[P]``.

    ``addresses`` int64 ``[E]``; an expert at address 0 is skipped, and its rows are left as they are.
    """
    if out.shape != (groups.order.shape[0], layout.hidden) or not out.is_contiguous():
        raise SchemeError(f"out is {tuple(out.shape)}: expected {(groups.order.shape[0], layout.hidden)}, contiguous")
    widths = arranged_width(layout.hidden), arranged_width(layout.inter)
    if widths != (scratch.tokens.shape[1], scratch.hidden.shape[1]):
        raise SchemeError(
            f"scratch for {scratch.tokens.shape[1]} and {scratch.hidden.shape[1]} features: expected {widths}"
        )
    run = launch_prefill if runtime.on_device(out) else prefill_reference
    run(groups, experts, addresses, layout, scratch, out)


def prefill_reference(
    groups: TokenGroups, experts: Tensor, addresses: Tensor, layout: ExpertLayout, scratch: PrefillScratch, out: Tensor
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
        out[pairs] = (y if groups.scales_input else y * groups.scores.reshape(-1, 1)[pairs].float()).to(out.dtype)


def launch_prefill(
    groups: TokenGroups, experts: Tensor, addresses: Tensor, layout: ExpertLayout, scratch: PrefillScratch, out: Tensor
) -> None:
    """``moe_prefill`` by two Triton kernels. Their grids hold as many tiles as these tokens could need, since
    the host does not know how they fell; the tiles too many end at once."""
    import triton

    from quant.kernels.cuda.device import gemm

    if out.dtype != torch.bfloat16:
        raise SchemeError(f"out is {out.dtype}: the CUDA kernels write bf16 (--exact runs on the CPU)")
    pairs, count = groups.order.shape[0], experts.shape[0]
    schemes = (layout.gate_up, layout.down)
    sizes_of = [tile_sizes(_MANY, scheme.bits) for scheme in schemes]
    tokens = min(size[1] for size in sizes_of)  # tiles of both are the same tokens
    tiles = -(-pairs // tokens) + min(count, pairs)
    hidden_width = scratch.hidden.shape[1]
    forms = [
        gemm.Tile(scheme.bits, scheme.group_size, rows, tokens, stages, runtime.operand())
        for scheme, (rows, _, _, stages) in zip(schemes, sizes_of, strict=True)
    ]
    slots = max(_EXPERTS, triton.next_power_of_2(count))
    options = {"num_warps": _WARPS, "num_stages": max(form.stages for form in forms), "enable_fp_fusion": True}
    common = {"ALIGNMENT": layout.alignment, "EXPERTS": slots, **options}
    tables = (experts, groups.starts, addresses)
    sizes = (count, layout.inter, *layout.gate_up_row, scratch.tokens.shape[1], hidden_width, *layout.offsets[:4])
    gemm.grouped_gate_up_kernel[(tiles, -(-hidden_width // forms[0].rows))](
        scratch.tokens, *tables, scratch.hidden, *sizes, DOWN_BITS=layout.down.bits, TILE=forms[0], **common
    )
    sorted_pairs = (scratch.hidden, groups.order, groups.scores)
    sizes = (count, layout.hidden, *layout.down_row, hidden_width, *layout.offsets[4:])
    scaled = not groups.scales_input
    gemm.grouped_down_kernel[(tiles, -(-layout.hidden // forms[1].rows))](
        *sorted_pairs, *tables, out, *sizes, SCALES_OUTPUT=scaled, TILE=forms[1], **common
    )


def combine(out: Tensor, top_k: int) -> Tensor:
    """The sum of each token's pairs ``[T·k, H]`` → ``[T, H]``, in the router's order."""
    return out if top_k == 1 else out.view(-1, top_k, out.shape[1]).sum(1)
