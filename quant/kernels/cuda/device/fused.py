"""Kernels of ``fused.py``: a norm, one token's q, k and v, the router's choice.

Legend: H hidden, h query heads, g KV heads, d head_dim, r rotated channels of a head, E experts, k experts
per token.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class HeadForm(NamedTuple):
    """What a kernel is compiled for: head_dim as ``width`` and, as a tile, ``padded``; ``qk_norm`` 1 per head, 2 over
    all heads; ``rope`` 1 pairs neighbours, 2 halves; ``l2``: a weightless norm follows."""

    width: int
    padded: int
    qk_norm: int
    rope: int
    l2: bool


@triton.jit
def rms_norm_kernel(x, weight, out, unrounded, features, eps, BLOCK: tl.constexpr):
    """out = x / √(mean(x²) + eps) · weight; one program per token, all of a row at once."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    live = at < features
    values = tl.load(x + token * features + at, mask=live, other=0.0)
    factor = 1.0 / tl.sqrt(tl.sum(values * values, 0) / features + eps)
    y = values * factor * tl.load(weight + at, mask=live, other=0.0)
    tl.store(out + token * features + at, y.to(out.dtype.element_ty), mask=live)
    if unrounded is not None:
        tl.store(unrounded + token * features + at, y, mask=live)


@triton.jit
def _head(x, norm, head, at, live, cosine, sine, rotated, eps, width, HEAD: tl.constexpr, WIDE: tl.constexpr):
    """Channels ``at`` of one head of x, normed and rotated, f32. A channel's partner in the rotation is
    loaded again rather than exchanged."""
    mine = tl.load(x + head * HEAD.width + at, mask=live, other=0.0).to(tl.float32)
    factor = 1.0
    if HEAD.qk_norm == 1:  # per head
        factor = 1.0 / tl.sqrt(tl.sum(mine * mine, 0) / HEAD.width + eps)
        mine = mine * factor * tl.load(norm + at, mask=live, other=0.0)
    elif HEAD.qk_norm == 2:  # over all heads
        everywhere = tl.arange(0, WIDE)
        all_heads = tl.load(x + everywhere, mask=everywhere < width, other=0.0).to(tl.float32)
        factor = 1.0 / tl.sqrt(tl.sum(all_heads * all_heads, 0) / width + eps)
        mine = mine * factor * tl.load(norm + head * HEAD.width + at, mask=live, other=0.0)
    if HEAD.rope > 0:
        half = rotated // 2
        turns = at < rotated
        if HEAD.rope == 1:  # neighbours
            angle, partner, first = at // 2, at ^ 1, at % 2 == 0
        else:  # halves
            first = at < half
            angle, partner = tl.where(first, at, at - half), tl.where(first, at + half, at - half)
        partner = tl.where(turns, partner, 0)
        other = tl.load(x + head * HEAD.width + partner, mask=live & turns, other=0.0).to(tl.float32) * factor
        if HEAD.qk_norm == 1:
            other = other * tl.load(norm + partner, mask=live & turns, other=0.0)
        elif HEAD.qk_norm == 2:
            other = other * tl.load(norm + head * HEAD.width + partner, mask=live & turns, other=0.0)
        c = tl.load(cosine + angle, mask=turns, other=1.0)
        s = tl.load(sine + angle, mask=turns, other=0.0)
        mine = mine * c + tl.where(first, -other, other) * s
    if HEAD.l2:
        mine = mine / tl.sqrt(tl.sum(mine * mine, 0) / HEAD.width + eps)
    return mine


@triton.jit
def append_kernel(
    q,
    k,
    v,
    q_norm,
    k_norm,
    cosine,
    sine,
    temperature,
    position,
    query,
    keys,
    values,
    key_scale,
    value_scale,
    heads,
    kv_heads,
    capacity,
    chunk,
    rotated,
    eps,
    HEAD: tl.constexpr,
    WIDE_Q: tl.constexpr,
    WIDE_K: tl.constexpr,
):
    """One head per program: h of q, then g of k, then g of v."""
    head = tl.program_id(0)
    at = tl.arange(0, HEAD.padded)
    live = at < HEAD.width
    if head < heads:
        mine = _head(q, q_norm, head, at, live, cosine, sine, rotated, eps, heads * HEAD.width, HEAD, WIDE_Q)
        if temperature is not None:
            mine = mine * tl.load(temperature)
        tl.store(query + head * HEAD.width + at, mine.to(query.dtype.element_ty), mask=live)
        return
    row = tl.load(position).to(tl.int64)
    if chunk > 0:
        row = row % chunk
    head -= heads
    if head < kv_heads:
        mine = _head(k, k_norm, head, at, live, cosine, sine, rotated, eps, kv_heads * HEAD.width, HEAD, WIDE_K)
        _store(keys, key_scale, head * capacity + row, at, live, mine, HEAD)
    else:
        head -= kv_heads
        mine = tl.load(v + head * HEAD.width + at, mask=live, other=0.0).to(tl.float32)
        _store(values, value_scale, head * capacity + row, at, live, mine, HEAD)


@triton.jit
def _store(target, scale, row, at, live, mine, HEAD: tl.constexpr):
    """One head of a token to row ``row`` (int64) of ``[g · capacity, d]``."""
    if scale is not None:
        factor = tl.maximum(tl.max(tl.abs(mine), 0), 1e-12) / 127.0
        tl.store(scale + row, factor)
        # Adding 1.5 · 2^23 leaves no bits for a fraction: f32 rounds half to even, as torch does.
        mine = (mine / factor + 12582912.0) - 12582912.0
    tl.store(target + row * HEAD.width + at, mine.to(target.dtype.element_ty), mask=live)


@triton.jit
def select_kernel(
    logits, chosen, scores, experts, KIND: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr
):
    """The k largest of a token's logits, the lowest index among equals; SLOTS is k rounded up to a power of
    two. KIND: 0 sigmoid, 1 softmax over all, 2 over the chosen."""
    token = tl.program_id(0).to(tl.int64)
    at, slot = tl.arange(0, BLOCK), tl.arange(0, SLOTS)
    values = tl.load(logits + token * experts + at, mask=at < experts, other=float("-inf"))
    values = tl.where((values != values) & (at < experts), -3.0e38, values)  # a NaN is never chosen first
    top = tl.max(values, 0)
    total = tl.sum(tl.exp(values - top), 0)
    ids = tl.zeros((SLOTS,), tl.int32)
    best = tl.full((SLOTS,), float("-inf"), tl.float32)
    for rank in tl.static_range(TOP_K):
        largest = tl.max(values, 0)
        index = tl.min(tl.where(values == largest, at, BLOCK), 0)
        ids = tl.where(slot == rank, index, ids)
        best = tl.where(slot == rank, largest, best)
        values = tl.where(at == index, float("-inf"), values)
    if KIND == 0:
        score = 1.0 / (1.0 + tl.exp(-best))
    elif KIND == 1:
        score = tl.exp(best - top) / total
    else:
        weights = tl.exp(best - top)
        score = weights / tl.sum(weights, 0)
    tl.store(chosen + token * TOP_K + slot, ids, mask=slot < TOP_K)
    tl.store(scores + token * TOP_K + slot, score, mask=slot < TOP_K)
