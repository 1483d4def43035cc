"""The small steps between the products of one decoded token, one kernel each: a norm, what attention does
to q, k and v before it attends, the router's choice.

A kernel in a CUDA graph costs about two microseconds however little it does, and stock modules launch some
fifty of them per layer for this.

Legend: T tokens, H hidden, h query heads, g KV heads, d head_dim, r rotated channels of a head, E experts, k
experts per token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.errors import SchemeError
from quant.kernels.attention import QK_NORMS, ROPES, AttentionShape
from quant.kernels.cuda import runtime
from quant.kernels.cuda.attention import KvRows
from quant.kernels.routing import ROUTERS, RouterKind

_LEAST_SCALE = 1e-12  # of an int8 row of zeros


def _power_of_two(size: int) -> int:
    """The least power of two that is no smaller than ``size``."""
    return 1 << (size - 1).bit_length()


@dataclass(frozen=True)
class HeadNorms:
    """Weights of the RMSNorm of q and k before RoPE, f32 ``[d]`` each (``per_head``) or full width."""

    q: Tensor
    k: Tensor


@dataclass(frozen=True)
class TokenPlace:
    """What depends on where in the text a token stands: ``position`` int32 ``[1]``, RoPE's ``cosine`` and ``sine`` f32
    ``[r/2]`` (where no layer rotates: r = 0), and ``temperature`` f32 ``[1]``, by which layers without RoPE multiply q
    if their shape says so."""

    position: Tensor
    cosine: Tensor
    sine: Tensor
    temperature: Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, unrounded: Tensor | None = None) -> Tensor:
    """x f32 ``[T, H]`` / √(mean(x²) + eps) · weight, in ``dtype``, and in f32 to ``unrounded``."""
    if x.dim() != 2 or weight.shape != x.shape[1:] or x.dtype != torch.float32:
        raise SchemeError(f"norm of {x.dtype} {tuple(x.shape)} by {tuple(weight.shape)}: expected f32 [T, H]")
    if runtime.on_device(x):
        return launch_rms_norm(x, weight, eps, dtype, unrounded)
    return rms_norm_reference(x, weight, eps, dtype, unrounded)


def launch_rms_norm(
    x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, unrounded: Tensor | None = None
) -> Tensor:
    """``rms_norm`` by its kernel."""
    from quant.kernels.cuda.device import fused

    tokens, features = x.shape
    out = torch.empty(tokens, features, dtype=dtype, device=x.device)
    block = _power_of_two(features)
    options = {"num_warps": min(16, max(1, block // 512)), "enable_fp_fusion": True}
    fused.rms_norm_kernel[(tokens,)](x, weight, out, unrounded, features, eps, BLOCK=block, **options)
    return out


def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, unrounded: Tensor | None = None
) -> Tensor:
    """``rms_norm`` in torch."""
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    if unrounded is not None:
        unrounded.copy_(y)
    return y.to(dtype)


def append(
    q: Tensor, k: Tensor, v: Tensor, shape: AttentionShape, rows: KvRows, at: TokenPlace, norms: HeadNorms | None = None
) -> Tensor:
    """Finish one token's q ``[1, h·d]``, k and v ``[1, g·d]``: norms, RoPE, temperature; store k and v.

    Returns q ``[1, h, 1, d]`` in its dtype. All arithmetic is f32.
    """
    _check(q, k, v, shape, rows, at, norms)
    run = launch_append if runtime.on_device(q) else append_reference
    return run(q, k, v, shape, rows, at, norms)


def launch_append(
    q: Tensor, k: Tensor, v: Tensor, shape: AttentionShape, rows: KvRows, at: TokenPlace, norms: HeadNorms | None
) -> Tensor:
    """``append`` by its kernel."""
    from quant.kernels.cuda.device import fused

    h, g, d = shape.heads, shape.kv_heads, shape.head_dim
    query = torch.empty(1, h, 1, d, dtype=q.dtype, device=q.device)
    whole, turns = shape.qk_norm == "full_width", shape.rope != "none"
    weights = (None, None) if norms is None else (norms.q, norms.k)
    angles = (at.cosine, at.sine) if turns else (None, None)
    temperature = at.temperature if shape.temperature_floor else None
    buffers = (rows.keys, rows.values, rows.key_scale, rows.value_scale)
    tensors = (q, k, v, *weights, *angles, temperature, at.position, query, *buffers)
    sizes = (h, g, rows.keys.shape[1], shape.chunk, 2 * at.cosine.numel() if turns else 0, shape.qk_eps)
    form = fused.HeadForm(d, _power_of_two(d), QK_NORMS[shape.qk_norm], ROPES[shape.rope], shape.l2_norm)
    wide_q, wide_k = (_power_of_two(heads * d) if whole else 1 for heads in (h, g))
    options = {"num_warps": 4 if whole else 1, "enable_fp_fusion": True}
    fused.append_kernel[(h + 2 * g,)](*tensors, *sizes, HEAD=form, WIDE_Q=wide_q, WIDE_K=wide_k, **options)
    return query


def append_reference(
    q: Tensor, k: Tensor, v: Tensor, shape: AttentionShape, rows: KvRows, at: TokenPlace, norms: HeadNorms | None
) -> Tensor:
    """``append`` in torch."""
    d = shape.head_dim
    query = _finish(q, shape, at, None if norms is None else norms.q)
    if shape.temperature_floor:
        query = query * at.temperature
    row = (at.position % shape.chunk if shape.chunk else at.position).long()
    _store(rows.keys, rows.key_scale, _finish(k, shape, at, None if norms is None else norms.k), row)
    _store(rows.values, rows.value_scale, v.float().view(-1, d), row)
    return query.to(q.dtype).view(1, shape.heads, 1, d)


def _finish(x: Tensor, shape: AttentionShape, at: TokenPlace, norm: Tensor | None) -> Tensor:
    """x ``[1, n·d]`` → f32 ``[n, d]``, normed and rotated."""
    x = x.float()
    if norm is not None and shape.qk_norm == "full_width":
        x = rms_norm_reference(x, norm, shape.qk_eps, torch.float32)
    x = x.view(-1, shape.head_dim)
    if norm is not None and shape.qk_norm == "per_head":
        x = rms_norm_reference(x, norm, shape.qk_eps, torch.float32)
    if shape.rope != "none":
        cosine, sine, turned = at.cosine, at.sine, 2 * at.cosine.numel()
        rotated, rest = x[:, :turned], x[:, turned:]
        if shape.rope == "interleaved":
            even, odd = rotated[:, 0::2], rotated[:, 1::2]
            both = torch.stack((even * cosine - odd * sine, odd * cosine + even * sine), -1).flatten(1)
        else:
            low, high = rotated.chunk(2, -1)
            both = torch.cat((low * cosine - high * sine, high * cosine + low * sine), -1)
        x = torch.cat((both, rest), -1)
    if shape.l2_norm:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + shape.qk_eps)
    return x


def _store(target: Tensor, scale: Tensor | None, states: Tensor, row: Tensor) -> None:
    """states f32 ``[g, d]`` to row ``row`` of every head."""
    if scale is not None:
        factor = states.abs().amax(-1, keepdim=True).clamp_min(_LEAST_SCALE) / 127
        scale.index_copy_(1, row, factor[:, None])
        states = (states / factor).round()
    target.index_copy_(1, row, states[:, None].to(target.dtype))


def _check(
    q: Tensor, k: Tensor, v: Tensor, shape: AttentionShape, rows: KvRows, at: TokenPlace, norms: HeadNorms | None
) -> None:
    d, h, g = shape.head_dim, shape.heads, shape.kv_heads
    if q.shape != (1, h * d) or k.shape != (1, g * d) or v.shape != (1, g * d):
        found = (tuple(q.shape), tuple(k.shape), tuple(v.shape))
        raise SchemeError(f"q, k and v are {found}: expected one token of {h} and {g} heads of {d}")
    if rows.keys.shape != rows.values.shape or rows.keys.shape[0] != g or rows.keys.shape[2] != d:
        raise SchemeError(f"KV buffers {tuple(rows.keys.shape)}: expected [{g}, capacity, {d}]")
    if (rows.keys.dtype == torch.int8) != (rows.key_scale is not None):
        raise SchemeError("int8 KV buffers, and only those, have scales")
    if (shape.qk_norm != "none") != (norms is not None):
        raise SchemeError(f"qk_norm is {shape.qk_norm!r}: expected norms to match")
    if at.cosine.shape != at.sine.shape or (shape.rope != "none" and not at.cosine.numel()):
        raise SchemeError(f"rope is {shape.rope!r}: expected cosines and sines to match")


def select(logits: Tensor, kind: RouterKind, chosen: Tensor, scores: Tensor) -> None:
    """The router's choice from logits f32 ``[T, E]``: ``chosen`` int32 ``[T, k]``, the largest first, the
    lower index among equals, and ``scores`` f32 ``[T, k]`` by ``kind`` (see ``MoeBlock``)."""
    if logits.dtype != torch.float32 or chosen.shape != scores.shape or chosen.shape[0] != logits.shape[0]:
        raise SchemeError(f"logits {logits.dtype} {tuple(logits.shape)}, chosen {tuple(chosen.shape)}")
    if runtime.on_device(logits):
        launch_select(logits, kind, chosen, scores)
    else:
        select_reference(logits, kind, chosen, scores)


def launch_select(logits: Tensor, kind: RouterKind, chosen: Tensor, scores: Tensor) -> None:
    """``select`` by its kernel."""
    from quant.kernels.cuda.device import fused

    tokens, experts = logits.shape
    top_k = chosen.shape[1]
    constants = {"KIND": ROUTERS[kind], "TOP_K": top_k, "SLOTS": _power_of_two(top_k), "BLOCK": _power_of_two(experts)}
    options = {"num_warps": 1, "enable_fp_fusion": True}
    fused.select_kernel[(tokens,)](logits, chosen, scores, experts, **constants, **options)


def select_reference(logits: Tensor, kind: RouterKind, chosen: Tensor, scores: Tensor) -> None:
    """``select`` in torch."""
    k = chosen.shape[1]
    order = torch.sort(logits, dim=-1, descending=True, stable=True)
    top, ids = order.values[:, :k], order.indices[:, :k]
    chosen.copy_(ids)
    if kind == "sigmoid_input":
        scores.copy_(top.sigmoid())
    elif kind == "softmax":
        scores.copy_((top - logits.logsumexp(-1, keepdim=True)).exp())
    else:
        scores.copy_(top.softmax(-1))
