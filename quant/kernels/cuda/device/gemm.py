"""Packed weights times many tokens, on tensor cores.

A step takes 16 units of each row: words, at 3 bits threes of them. Element i of those, for i in 0..7 (0..3 at 8 bit,
0..15 at 2, 0..31 at 3), makes an operand
``[N, 16]`` of its own in registers: words go from global through shared memory straight into the layout the
tensor core wants, so weights are never written anywhere unpacked. Opposite to operand i lie the activations
of elements i, which is why activations are stored arranged: blocks of 16 units, within a block element by
element. The order of a sum's terms is free as long as both sides agree.

A group that spans the step's words has its scale applied to the step's sum, in f32; smaller groups have it
applied to the weights, which then are rounded to bf16 as dequantized weights are.

Legend: K in features, N rows of a tile, T tokens of a tile, W = 16 units.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from quant.kernels.cuda.device.words import matrix, weight, weight_of_three

STEP_UNITS = tl.constexpr(16)


class Tile(NamedTuple):
    """What a kernel is compiled for: the weight's ``bits`` and ``group``, the ``rows`` and ``tokens`` of a tile, the
    ``stages`` of its pipeline, and the type of a tensor core's ``operand``."""

    bits: int
    group: int
    rows: int
    tokens: int
    stages: int
    operand: Any


@triton.jit
def source_feature(position, BITS: tl.constexpr):
    """Which feature lies at ``position`` of an arranged row."""
    VALUES: tl.constexpr = 32 if BITS == 3 else 32 // BITS
    BLOCK: tl.constexpr = STEP_UNITS * VALUES
    within = position % BLOCK
    return position - within + (within % STEP_UNITS) * VALUES + within // STEP_UNITS


@triton.jit
def arrange_kernel(
    x, order, scores, out, features, width, TOP_K: tl.constexpr, BITS: tl.constexpr, COLUMNS: tl.constexpr
):
    """out[r] = x's row, arranged, then zeros: of pair order[r] if there is an order, times its score if there are
    scores."""
    row = tl.program_id(0).to(tl.int64)
    position = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    feature = source_feature(position, BITS)
    token = row
    factor = 1.0
    if order is not None:
        pair = tl.load(order + row)
        token = (pair // TOP_K).to(tl.int64)
        if scores is not None:
            factor = tl.load(scores + pair)
    values = tl.load(x + token * features + feature, mask=feature < features, other=0.0).to(tl.float32)
    tl.store(out + row * width + position, (values * factor).to(tl.bfloat16), mask=position < width)


@triton.jit
def _value(first, second, third, i: tl.constexpr, BITS: tl.constexpr):
    """Element ``i`` of each unit."""
    return weight_of_three(first, second, third, i) if BITS == 3 else weight(first, i, BITS)


@triton.jit
def tile_product(packed, scale, x, rows, tokens, live_tokens, row_words, groups, width, TILE: tl.constexpr):
    """W[rows]·x[tokens]ᵀ → f32 ``[N, T]``; ``x`` arranged, ``width`` features per arranged row."""
    ROWS: tl.constexpr = TILE.rows
    TOKENS: tl.constexpr = TILE.tokens
    BITS: tl.constexpr = TILE.bits
    OPERAND: tl.constexpr = TILE.operand
    VALUES: tl.constexpr = 32 if BITS == 3 else 32 // BITS
    GROUP_UNITS: tl.constexpr = TILE.group // VALUES
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    lane = tl.arange(0, STEP_UNITS)
    row_places = packed + rows[:, None] * row_words
    token_places = x + tokens[None, :] * width + lane[:, None]
    units = row_words // 3 if BITS == 3 else row_words
    for start in tl.range(0, units, STEP_UNITS, num_stages=TILE.stages):
        unit = start + lane
        live = (unit < units)[None, :]
        places = row_places + (unit * 3 if BITS == 3 else unit)[None, :]
        values = tl.load(places, mask=live, other=0)
        second = values
        third = values
        if BITS == 3:
            second, third = tl.load(places + 1, mask=live, other=0), tl.load(places + 2, mask=live, other=0)
        if GROUP_UNITS >= STEP_UNITS:
            part = tl.zeros((ROWS, TOKENS), tl.float32)
            for i in tl.static_range(VALUES):
                four = tl.load(token_places + start * VALUES + i * STEP_UNITS, mask=live_tokens[None, :], other=0.0)
                part = tl.dot(_value(values, second, third, i, BITS).to(OPERAND), four.to(OPERAND), part)
            scales = tl.load(scale + rows * groups + start // GROUP_UNITS).to(tl.float32)
            total += part * scales[:, None]
        else:
            places = scale + rows[:, None] * groups + (unit // GROUP_UNITS)[None, :]
            scales = tl.load(places, mask=live, other=0.0).to(tl.float32)
            for i in tl.static_range(VALUES):
                four = tl.load(token_places + start * VALUES + i * STEP_UNITS, mask=live_tokens[None, :], other=0.0)
                value = _value(values, second, third, i, BITS)
                total = tl.dot((value * scales).to(OPERAND), four.to(OPERAND), total)
    return total


@triton.jit(do_not_specialize=["count"])
def gemm_kernel(
    x, packed, scale, out, count, features, row_words, groups, width, ADD: tl.constexpr, TILE: tl.constexpr
):
    """out[t, n] = Σ W[n, k]·x[t, k]; with ADD, f32 out is added to."""
    token = tl.program_id(0) * TILE.tokens + tl.arange(0, TILE.tokens)
    row = tl.program_id(1) * TILE.rows + tl.arange(0, TILE.rows)
    if TILE.bits >= 4:  # whole groups; of fewer bits they may be two words or three
        row_words = tl.multiple_of(row_words, 4)
    read = tl.minimum(row, features - 1).to(tl.int64)
    y = tile_product(packed, scale, x, read, token.to(tl.int64), token < count, row_words, groups, width, TILE)
    places = out + token.to(tl.int64)[None, :] * features + row[:, None]
    live = (token < count)[None, :] & (row < features)[:, None]
    if ADD:
        y += tl.load(places, mask=live, other=0.0)
    tl.store(places, y.to(out.dtype.element_ty), mask=live)


@triton.jit
def _expert_tile(experts, starts, count, tile, TOKENS: tl.constexpr, EXPERTS: tl.constexpr):
    """(expert, its first row of this tile, its end) of the ``tile``-th tile over ``experts``; an empty range
    where there are fewer tiles."""
    index = tl.arange(0, EXPERTS)
    here = index < count
    ids = tl.load(experts + index, mask=here, other=0)
    first = tl.load(starts + ids, mask=here, other=0)
    end = tl.load(starts + ids + 1, mask=here, other=0)
    tiles = (end - first + TOKENS - 1) // TOKENS
    ends = tl.cumsum(tiles, 0)
    found = index == tl.sum((ends <= tile).to(tl.int32), 0)
    row = first + (tile - (ends - tiles)) * TOKENS
    return (tl.sum(tl.where(found, ids, 0), 0), tl.sum(tl.where(found, row, 0), 0), tl.sum(tl.where(found, end, 0), 0))


@triton.jit(do_not_specialize=["count"])
def grouped_gate_up_kernel(
    x,
    experts,
    starts,
    addresses,
    hidden,
    count,
    inter,
    row_words,
    groups,
    width,
    hidden_width,
    gate_packed,
    gate_scale,
    up_packed,
    up_scale,
    DOWN_BITS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    EXPERTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """hidden[r, :] = silu(gate·x[r])·(up·x[r]), arranged for down_proj: a tile's rows are taken in that
    order, so that it writes without gaps."""
    expert, begin, end = _expert_tile(experts, starts, count, tl.program_id(0), TILE.tokens, EXPERTS)
    if begin >= end:
        return
    address = tl.load(addresses + expert)
    if address == 0:
        return
    if TILE.bits >= 4:  # whole groups; of fewer bits they may be two words or three
        row_words = tl.multiple_of(row_words, 4)
    token = begin + tl.arange(0, TILE.tokens)
    live = token < end
    position = tl.program_id(1) * TILE.rows + tl.arange(0, TILE.rows)
    feature = source_feature(position, DOWN_BITS)
    read = tl.minimum(feature, inter - 1).to(tl.int64)
    words, scales = matrix(address, gate_packed, gate_scale, ALIGNMENT)
    gate = tile_product(words, scales, x, read, token.to(tl.int64), live, row_words, groups, width, TILE)
    words, scales = matrix(address, up_packed, up_scale, ALIGNMENT)
    up = tile_product(words, scales, x, read, token.to(tl.int64), live, row_words, groups, width, TILE)
    result = tl.where((feature < inter)[:, None], gate * tl.sigmoid(gate) * up, 0.0)
    places = hidden + token.to(tl.int64)[None, :] * hidden_width + position[:, None]
    tl.store(places, result.to(tl.bfloat16), mask=live[None, :] & (position < hidden_width)[:, None])


@triton.jit(do_not_specialize=["count"])
def grouped_down_kernel(
    hidden,
    order,
    scores,
    experts,
    starts,
    addresses,
    out,
    count,
    features,
    row_words,
    groups,
    width,
    down_packed,
    down_scale,
    SCALES_OUTPUT: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    EXPERTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """out[order[r], :] = down·hidden[r], times the pair's score where SCALES_OUTPUT."""
    expert, begin, end = _expert_tile(experts, starts, count, tl.program_id(0), TILE.tokens, EXPERTS)
    if begin >= end:
        return
    address = tl.load(addresses + expert)
    if address == 0:
        return
    if TILE.bits >= 4:  # whole groups; of fewer bits they may be two words or three
        row_words = tl.multiple_of(row_words, 4)
    token = begin + tl.arange(0, TILE.tokens)
    live = token < end
    row = tl.program_id(1) * TILE.rows + tl.arange(0, TILE.rows)
    read = tl.minimum(row, features - 1).to(tl.int64)
    words, scales = matrix(address, down_packed, down_scale, ALIGNMENT)
    y = tile_product(words, scales, hidden, read, token.to(tl.int64), live, row_words, groups, width, TILE)
    pair = tl.load(order + token, mask=live, other=0)
    if SCALES_OUTPUT:
        y *= tl.load(scores + pair, mask=live, other=0.0)[None, :]
    places = out + pair.to(tl.int64)[None, :] * features + row[:, None]
    tl.store(places, y.to(tl.bfloat16), mask=live[None, :] & (row < features)[:, None])
