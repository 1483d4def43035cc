"""Attention of one token over a KV cache whose length only the device knows.

The kept tokens are cut into parts, ``splits`` per KV head, so that a long context fills the card at batch 1; a
part keeps a running maximum and sum, and a second kernel joins them. int8 keys and values stay integers up to
the tensor core: a key's scale multiplies its score, a value's scale its weight.

Legend: h query heads, g KV heads, q = h/g query heads per KV head, d head_dim, B tokens per step.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class AttentionForm(NamedTuple):
    """What a kernel is compiled for: the layer's ``chunk`` (0: none), the ``group`` of query heads per KV head and
    its size as a tile, ``queries``; head_dim as ``width`` and, as a tile, ``padded``; ``tokens`` of a step; parts,
    ``splits``; the type of a tensor core's ``operand``."""

    chunk: int
    group: int
    queries: int
    width: int
    padded: int
    tokens: int
    splits: int
    operand: Any


@triton.jit
def part_kernel(
    query, keys, values, key_scale, value_scale, position, sums, bounds, capacity, scaling, FORM: tl.constexpr
):
    """sums f32 ``[h, splits, d]``: Σ exp(score - maximum)·value of each part; bounds f32
    ``[h, splits, 2]``: (maximum, Σ exp(score - maximum)), (-inf, 0) for a part without tokens."""
    QUERIES: tl.constexpr = FORM.queries
    PADDED: tl.constexpr = FORM.padded
    WIDTH: tl.constexpr = FORM.width
    TOKENS: tl.constexpr = FORM.tokens
    SPLITS: tl.constexpr = FORM.splits
    OPERAND: tl.constexpr = FORM.operand
    head, part = tl.program_id(0), tl.program_id(1)
    row = tl.load(position)
    if FORM.chunk > 0:
        row = row % FORM.chunk
    length = (row + 1).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, SPLITS), TOKENS) * TOKENS
    begin = part * share
    end = tl.minimum(begin + share, length)
    index = tl.arange(0, QUERIES)
    channel = tl.arange(0, PADDED)
    mine = (index < FORM.group)[:, None] & (channel < WIDTH)[None, :]
    rows = head * FORM.group + index
    asked = tl.load(query + rows[:, None] * WIDTH + channel[None, :], mask=mine, other=0.0).to(OPERAND)
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    weight = tl.zeros((QUERIES,), tl.float32)
    total = tl.zeros((QUERIES, PADDED), tl.float32)
    first = head.to(tl.int64) * capacity
    for start in range(begin, end, TOKENS):
        token = start + tl.arange(0, TOKENS)
        live = token < end
        places = (first + token) * WIDTH
        inside = live[None, :] & (channel < WIDTH)[:, None]
        key = tl.load(keys + places[None, :] + channel[:, None], mask=inside, other=0.0)  # [d, B]
        score = tl.dot(asked, key.to(OPERAND)) * scaling
        if key_scale is not None:
            score *= tl.load(key_scale + first + token, mask=live, other=0.0)[None, :]
        score = tl.where(live[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        shrink = tl.exp(top - higher)
        exponent = tl.exp(score - higher[:, None])
        weight = weight * shrink + tl.sum(exponent, 1)
        if value_scale is not None:
            exponent *= tl.load(value_scale + first + token, mask=live, other=0.0)[None, :]
        inside = live[:, None] & (channel < WIDTH)[None, :]
        value = tl.load(values + places[:, None] + channel[None, :], mask=inside, other=0.0)  # [B, d]
        total = total * shrink[:, None] + tl.dot(exponent.to(OPERAND), value.to(OPERAND))
        top = higher
    slot = rows * SPLITS + part
    tl.store(bounds + slot * 2, top, mask=index < FORM.group)
    tl.store(bounds + slot * 2 + 1, weight, mask=index < FORM.group)
    if begin < end:
        tl.store(sums + slot[:, None] * WIDTH + channel[None, :], total, mask=mine)


@triton.jit
def join_kernel(sums, bounds, out, FORM: tl.constexpr):
    """out[h, :] = the parts' sums, each brought to the common maximum, over the sum of their weights."""
    WIDTH: tl.constexpr = FORM.width
    head = tl.program_id(0)
    part = tl.arange(0, FORM.splits)
    channel = tl.arange(0, FORM.padded)
    slot = head * FORM.splits + part
    top = tl.load(bounds + slot * 2)
    weight = tl.load(bounds + slot * 2 + 1)
    factor = tl.exp(top - tl.max(top, 0))  # 0 for a part without tokens
    live = (weight > 0)[:, None] & (channel < WIDTH)[None, :]
    total = tl.load(sums + slot[:, None] * WIDTH + channel[None, :], mask=live, other=0.0)
    result = tl.sum(total * factor[:, None], 0) / tl.sum(weight * factor, 0)
    tl.store(out + head * WIDTH + channel, result.to(out.dtype.element_ty), mask=channel < WIDTH)
