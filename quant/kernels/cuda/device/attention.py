"""Attention of one token over a KV cache whose length only the device knows.

The kept tokens are cut into SPLITS parts per KV head, so that a long context fills the card at batch 1; a
part keeps a running maximum and sum, and a second kernel joins them. int8 keys and values stay integers up to
the tensor core: a key's scale multiplies its score, a value's scale its weight.

Legend: h query heads, g KV heads, q = h/g query heads per KV head, d head_dim, B tokens per step.
"""

import triton
import triton.language as tl


@triton.jit
def part_kernel(
    query,
    keys,
    values,
    key_scale,
    value_scale,
    position,
    sums,
    bounds,
    capacity,
    scaling,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    SCALED: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """sums f32 ``[h, SPLITS, d]``: Σ exp(score - maximum)·value of each part; bounds f32
    ``[h, SPLITS, 2]``: (maximum, Σ exp(score - maximum)), (-inf, 0) for a part without tokens."""
    head, part = tl.program_id(0), tl.program_id(1)
    row = tl.load(position)
    if CHUNK > 0:
        row = row % CHUNK
    length = (row + 1).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, SPLITS), TOKENS) * TOKENS
    begin = part * share
    end = tl.minimum(begin + share, length)
    index = tl.arange(0, QUERIES)
    channel = tl.arange(0, PADDED)
    mine = (index < GROUP)[:, None] & (channel < WIDTH)[None, :]
    rows = head * GROUP + index
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
        if SCALED:
            score *= tl.load(key_scale + first + token, mask=live, other=0.0)[None, :]
        score = tl.where(live[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        shrink = tl.exp(top - higher)
        exponent = tl.exp(score - higher[:, None])
        weight = weight * shrink + tl.sum(exponent, 1)
        if SCALED:
            exponent *= tl.load(value_scale + first + token, mask=live, other=0.0)[None, :]
        inside = live[:, None] & (channel < WIDTH)[None, :]
        value = tl.load(values + places[:, None] + channel[None, :], mask=inside, other=0.0)  # [B, d]
        total = total * shrink[:, None] + tl.dot(exponent.to(OPERAND), value.to(OPERAND))
        top = higher
    slot = rows * SPLITS + part
    tl.store(bounds + slot * 2, top, mask=index < GROUP)
    tl.store(bounds + slot * 2 + 1, weight, mask=index < GROUP)
    if begin < end:
        tl.store(sums + slot[:, None] * WIDTH + channel[None, :], total, mask=mine)


@triton.jit
def join_kernel(sums, bounds, out, WIDTH: tl.constexpr, PADDED: tl.constexpr, SPLITS: tl.constexpr):
    """out[h, :] = the parts' sums, each brought to the common maximum, over the sum of their weights."""
    head = tl.program_id(0)
    part = tl.arange(0, SPLITS)
    channel = tl.arange(0, PADDED)
    slot = head * SPLITS + part
    top = tl.load(bounds + slot * 2)
    weight = tl.load(bounds + slot * 2 + 1)
    factor = tl.exp(top - tl.max(top, 0))  # 0 for a part without tokens
    live = (weight > 0)[:, None] & (channel < WIDTH)[None, :]
    total = tl.load(sums + slot[:, None] * WIDTH + channel[None, :], mask=live, other=0.0)
    result = tl.sum(total * factor[:, None], 0) / tl.sum(weight * factor, 0)
    tl.store(out + head * WIDTH + channel, result.to(out.dtype.element_ty), mask=channel < WIDTH)
