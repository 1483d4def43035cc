"""Matrix times vector on packed rows, and the two halves of an expert for one token.

A program takes ROWS rows; its warps lie along K, so that a warp reads 512 contiguous bytes of a row at a
time, 16 bytes per lane. Sums stay in registers, one per word of the tile, until the end of the row: no
exchange between lanes inside the loop, and enough loads in flight without a pipeline.

Legend: K in features, W units of a row per step (words; at 3 bits three of them), N rows per program.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from quant.kernels.cuda.device.words import few_dot, matrix, word_dot


class Rows(NamedTuple):
    """What a kernel is compiled for: the weight's ``bits`` and ``group``, the ``rows`` of a program and the
    ``words`` of each that it takes in a step (units, at 3 bits)."""

    bits: int
    group: int
    rows: int
    words: int


@triton.jit
def _stream(places, live):
    """Packed words ``[N, W]``, read once: first to leave the caches, where scales and activations stay."""
    return tl.load(places, mask=live[None, :], other=0, eviction_policy="evict_first")


@triton.jit
def _scales(scale, rows, word, live, groups, GROUP_WORDS: tl.constexpr):
    """The scale of each word's group, f32 ``[N, W]``: lanes of one group read one address."""
    places = scale + rows[:, None] * groups + (word // GROUP_WORDS)[None, :]
    return tl.load(places, mask=live[None, :], other=0.0).to(tl.float32)


@triton.jit
def _activations(x, word, live, BITS: tl.constexpr):
    """bf16 activations opposite to each word, four to an int64: (elements 0-3, elements 4-7)."""
    fours = x.to(tl.pointer_type(tl.int64)) + word * (8 // BITS)
    first = tl.load(fours, mask=live, other=0)
    second = first
    if BITS == 4:
        second = tl.load(fours + 1, mask=live, other=0)
    return first, second


@triton.jit
def _few(packed, rows, unit, live, row_words, x, BITS: tl.constexpr):
    """Each unit's weights of 2 or 3 bits times their activations, f32 ``[N, W]``."""
    places = packed + rows[:, None] * row_words + (unit * 3 if BITS == 3 else unit)[None, :]
    first = _stream(places, live)
    second = first
    third = first
    if BITS == 3:
        second, third = _stream(places + 1, live), _stream(places + 2, live)
    return few_dot(first, second, third, x, unit, live, BITS)


@triton.jit
def row_dots(packed, scale, x, rows, used, row_words, groups, FORM: tl.constexpr):
    """Σ W[row, k]·x[k] over the first ``used`` words of each row → f32 ``[N]``."""
    ROWS: tl.constexpr = FORM.rows
    WORDS: tl.constexpr = FORM.words
    BITS: tl.constexpr = FORM.bits
    GROUP_UNITS: tl.constexpr = FORM.group // 32 if BITS == 3 else FORM.group * BITS // 32
    total = tl.zeros((ROWS, WORDS), tl.float32)
    units = used // 3 if BITS == 3 else used
    for start in range(0, units, WORDS):
        unit = start + tl.arange(0, WORDS)
        live = unit < units
        scales = _scales(scale, rows, unit, live, groups, GROUP_UNITS)
        if BITS < 4:
            total += _few(packed, rows, unit, live, row_words, x, BITS) * scales
        else:
            values = _stream(packed + rows[:, None] * row_words + unit[None, :], live)
            first, second = _activations(x, unit, live, BITS)
            total += word_dot(values, first, second, BITS) * scales
    return tl.sum(total, 1)


@triton.jit
def gemv_kernel(x, packed, scale, out, features, row_words, groups, ADD: tl.constexpr, FORM: tl.constexpr):
    """out[n] = Σ W[n, k]·x[k] for one token; with ADD, f32 out[n] is added to."""
    row = tl.program_id(0).to(tl.int64) * FORM.rows + tl.arange(0, FORM.rows)
    if FORM.bits >= 4:  # whole groups; of fewer bits they may be two words or three
        row_words = tl.multiple_of(row_words, 4)
    read = tl.minimum(row, features - 1)
    y = row_dots(packed, scale, x, read, row_words, row_words, groups, FORM)
    if ADD:
        y += tl.load(out + row, mask=row < features, other=0.0)
    tl.store(out + row, y.to(out.dtype.element_ty), mask=row < features)


@triton.jit
def _features_here(place, address, gpu_rows, inter):
    """How many of an expert's intermediate features this card computes."""
    return tl.where(address == 0, 0, tl.where(place == 0, inter, tl.where(place == 1, gpu_rows, 0)))


@triton.jit
def gate_up_kernel(
    x,
    chosen,
    scores,
    addresses,
    places,
    gpu_rows,
    hidden,
    features,
    inter,
    row_words,
    groups,
    gate_packed,
    gate_scale,
    up_packed,
    up_scale,
    TOP_K: tl.constexpr,
    SCALES_INPUT: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    FORM: tl.constexpr,
):
    """hidden[pair, i] = silu(gate_i·x)·(up_i·x) for the rows i of each chosen expert that are this card's.

    The product is linear in x, so a score that scales the input scales both sums instead. Programs of
    different pairs are neighbours in the grid: those that read the same expert share it in L2.
    """
    pair = tl.program_id(0)
    expert = tl.load(chosen + pair)
    if expert < 0:
        return
    address = tl.load(addresses + expert)
    mine = _features_here(tl.load(places + expert), address, tl.load(gpu_rows), inter)
    ROWS: tl.constexpr = FORM.rows
    WORDS: tl.constexpr = FORM.words
    begin = tl.program_id(1) * ROWS
    if begin >= mine:
        return
    if FORM.bits >= 4:  # whole groups; of fewer bits they may be two words or three
        row_words = tl.multiple_of(row_words, 4)
    row = begin + tl.arange(0, ROWS)
    read = tl.minimum(row, inter - 1).to(tl.int64)
    token = x + (pair // TOP_K).to(tl.int64) * features
    gate_words, gate_scales = matrix(address, gate_packed, gate_scale, ALIGNMENT)
    up_words, up_scales = matrix(address, up_packed, up_scale, ALIGNMENT)
    BITS: tl.constexpr = FORM.bits
    GROUP_UNITS: tl.constexpr = FORM.group // 32 if BITS == 3 else FORM.group * BITS // 32
    gate = tl.zeros((ROWS, WORDS), tl.float32)
    up = tl.zeros((ROWS, WORDS), tl.float32)
    units = row_words // 3 if BITS == 3 else row_words
    for start in range(0, units, WORDS):
        unit = start + tl.arange(0, WORDS)
        live = unit < units
        gate_factors = _scales(gate_scales, read, unit, live, groups, GROUP_UNITS)
        up_factors = _scales(up_scales, read, unit, live, groups, GROUP_UNITS)
        if BITS < 4:
            gate += _few(gate_words, read, unit, live, row_words, token, BITS) * gate_factors
            up += _few(up_words, read, unit, live, row_words, token, BITS) * up_factors
        else:
            place = read[:, None] * row_words + unit[None, :]
            gate_values, up_values = _stream(gate_words + place, live), _stream(up_words + place, live)
            first, second = _activations(token, unit, live, BITS)
            gate += word_dot(gate_values, first, second, BITS) * gate_factors
            up += word_dot(up_values, first, second, BITS) * up_factors
    gated, linear = tl.sum(gate, 1), tl.sum(up, 1)
    if SCALES_INPUT:
        score = tl.load(scores + pair)
        gated, linear = gated * score, linear * score
    result = gated * tl.sigmoid(gated) * linear
    tl.store(hidden + pair.to(tl.int64) * inter + row, result.to(tl.bfloat16), mask=row < mine)


@triton.jit
def down_kernel(
    hidden,
    chosen,
    scores,
    addresses,
    places,
    gpu_rows,
    out,
    features,
    inter,
    row_words,
    groups,
    down_packed,
    down_scale,
    TOP_K: tl.constexpr,
    CHOICES: tl.constexpr,
    SCALES_INPUT: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    FORM: tl.constexpr,
):
    """out[token] += Σ over the token's experts, in the router's order, of score · down·hidden[pair].

    One program owns its rows of ``out``: no atomics, the sum has one order, two runs agree to the bit.
    """
    token = tl.program_id(0)
    ROWS: tl.constexpr = FORM.rows
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    read = tl.minimum(row, features - 1).to(tl.int64)
    if FORM.bits >= 4:  # whole groups; of fewer bits they may be two words or three
        row_words = tl.multiple_of(row_words, 4)
    # All choices are looked up at once: one after the other, each would wait three times for memory.
    index = tl.arange(0, CHOICES)
    asked = index < TOP_K
    experts = tl.load(chosen + token * TOP_K + index, mask=asked, other=-1)
    known = tl.maximum(experts, 0)
    found = tl.load(addresses + known)
    mine = _features_here(tl.load(places + known), found, tl.load(gpu_rows), inter)
    mine = tl.where(experts < 0, 0, mine)
    factors = tl.load(scores + token * TOP_K + index, mask=asked, other=0.0)
    total = tl.zeros((ROWS,), tl.float32)
    for choice in range(TOP_K):
        here = index == choice
        address = tl.sum(tl.where(here, found, 0), 0)
        used = tl.sum(tl.where(here, mine, 0), 0) * FORM.bits // 32
        if FORM.bits >= 4:
            used = tl.multiple_of(used, 4)
        pair = (token * TOP_K + choice).to(tl.int64)
        words, scales = matrix(address, down_packed, down_scale, ALIGNMENT)
        y = row_dots(words, scales, hidden + pair * inter, read, used, row_words, groups, FORM)
        total += y if SCALES_INPUT else y * tl.sum(tl.where(here, factors, 0.0), 0)
    place = out + token.to(tl.int64) * features + row
    live = row < features
    tl.store(place, tl.load(place, mask=live, other=0.0) + total, mask=live)
