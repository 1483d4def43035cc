"""The card's end of the doorbell: write a request to host memory and ring; wait for the answer and add it.

Both kernels decide on the device whether the host has anything to compute, in the same way, and do nothing
else. Host memory is written with plain stores and published by one store with release at system scope (its
effect covers the other threads' stores, which the barrier before it orders); the answer's flag is read with
acquire at system scope. No atomics: across PCIe they are not atomic against the CPU.

NATIVE is False in Triton's interpreter, which knows no assembly and runs one program at a time.
"""

import triton
import triton.language as tl

from quant.kernels.cuda import doorbell

RUNG, ANSWERED = tl.constexpr(doorbell.RUNG), tl.constexpr(doorbell.ANSWERED)
STOP, LOST = tl.constexpr(doorbell.STOP), tl.constexpr(doorbell.LOST)
HEADER = tl.constexpr(doorbell.HEADER)
COPIED = tl.constexpr(4096)


@triton.jit
def _publish(word, value, NATIVE: tl.constexpr):
    if NATIVE:
        tl.inline_asm_elementwise(
            "st.release.sys.global.b32 [$1], $2; mov.b32 $0, $2;",
            "=r,l,r",
            [word, value],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.store(word, value)


@triton.jit
def _observe(word, NATIVE: tl.constexpr):
    if NATIVE:
        value = tl.inline_asm_elementwise(
            "ld.acquire.sys.global.b32 $0, [$1];", "=r,l", [word], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        value = tl.load(word, volatile=True)
    return value


@triton.jit
def _first_features(chosen, places, gpu_rows, inter, count, PAIRS: tl.constexpr):
    """(experts, the first intermediate feature of each that is the host's: ``inter`` for none)."""
    pair = tl.arange(0, PAIRS)
    expert = tl.load(chosen + pair, mask=pair < count, other=-1)
    known = tl.maximum(expert, 0)
    place = tl.load(places + known)
    begin = tl.minimum(tl.load(gpu_rows), inter)
    first = tl.where(place == 0, inter, tl.where(place == 1, begin, 0))
    return known, tl.where(expert < 0, inter, first)


@triton.jit
def _advise(logits, places, hint, row, experts, TOP_K: tl.constexpr, SLOTS: tl.constexpr, WIDE: tl.constexpr):
    """The k largest of the coming layer's logits, as ``select_kernel`` picks them: 1 + row · E + expert each,
    0 for one in VRAM. Written through to the host, in no order with anything: it is advice."""
    at, slot = tl.arange(0, WIDE), tl.arange(0, SLOTS)
    values = tl.load(logits + at, mask=at < experts, other=float("-inf"))
    values = tl.where((values != values) & (at < experts), -3.0e38, values)
    ids = tl.zeros((SLOTS,), tl.int32)
    for rank in tl.static_range(TOP_K):
        index = tl.min(tl.where(values == tl.max(values, 0), at, WIDE), 0)
        ids = tl.where(slot == rank, index, ids)
        values = tl.where(at == index, float("-inf"), values)
    place = tl.load(places + ids, mask=slot < TOP_K, other=0)
    word = tl.where(place == 0, 0, 1 + row * experts + ids)
    tl.store(hint + slot, word, mask=slot < TOP_K, cache_modifier=".wt")


@triton.jit(do_not_specialize=["layer", "next_row"])
def ring_kernel(
    x,
    chosen,
    scores,
    places,
    gpu_rows,
    control,
    request,
    host_scores,
    host_x,
    sequence,
    next_logits,
    next_places,
    hint,
    next_row,
    layer,
    inter,
    tokens,
    top_k,
    features,
    experts,
    PAIRS: tl.constexpr,
    GUESS: tl.constexpr,
    TOP_K: tl.constexpr,
    WIDE: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Ask the host for its part of the chosen experts, if it has one, then say what comes next. GUESS: 0 say
    nothing, 1 the coming layer's best, 2 that nothing is known."""
    count = tokens * top_k
    expert, first = _first_features(chosen, places, gpu_rows, inter, count, PAIRS)
    if tl.sum((first < inter).to(tl.int32), 0) > 0:
        pair = tl.arange(0, PAIRS)
        inside = pair < count
        tl.store(request + HEADER + pair, expert, mask=inside)
        tl.store(request + HEADER + count + pair, first, mask=inside)
        tl.store(host_scores + pair, tl.load(scores + pair, mask=inside, other=0.0), mask=inside)
        tl.store(request, layer)
        tl.store(request + 1, tokens)
        tl.store(request + 2, top_k)
        for start in range(0, tokens * features, COPIED):
            index = start + tl.arange(0, COPIED)
            live = index < tokens * features
            tl.store(host_x + index, tl.load(x + index, mask=live, other=0.0).to(tl.float32), mask=live)
        number = tl.load(sequence) + 1
        tl.debug_barrier()
        tl.store(sequence, number)
        tl.debug_barrier()
        _publish(control + RUNG, number, NATIVE)
    if GUESS == 1:  # behind the request: nobody waits for it
        _advise(next_logits, next_places, hint, next_row, experts, TOP_K, PAIRS, WIDE)
    if GUESS == 2:
        slot = tl.arange(0, PAIRS)
        nothing = tl.zeros((PAIRS,), tl.int32)
        tl.store(hint + slot, nothing, mask=slot < TOP_K, cache_modifier=".wt")


@triton.jit(do_not_specialize=["patience"])
def answer_kernel(
    chosen,
    places,
    gpu_rows,
    control,
    result,
    sequence,
    out,
    inter,
    tokens,
    top_k,
    features,
    patience,
    PAIRS: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """out += result, once the host has answered what ``ring_kernel`` asked.

    Gives up after ``patience`` looks at the flag, or when the host says so: sets the LOST word and adds
    nothing; a step that has lost one answer waits for no other.
    """
    _, first = _first_features(chosen, places, gpu_rows, inter, tokens * top_k, PAIRS)
    if tl.sum((first < inter).to(tl.int32), 0) > 0:
        number = tl.load(sequence)
        looks = tl.where(tl.load(control + LOST, volatile=True) != 0, patience, 0)
        seen = _observe(control + ANSWERED, NATIVE)
        while (seen != number) & (looks < patience):
            seen = _observe(control + ANSWERED, NATIVE)
            looks += 1
            if looks % 256 == 0:
                looks = tl.where(_observe(control + STOP, NATIVE) != 0, patience, looks)
        # No barrier from here on: warps whose patience ran out at that very moment go another way.
        if seen == number:
            for start in range(0, tokens * features, COPIED):
                index = start + tl.arange(0, COPIED)
                live = index < tokens * features
                more = tl.load(result + index, mask=live, other=0.0)
                tl.store(out + index, tl.load(out + index, mask=live, other=0.0) + more, mask=live)
        else:
            _publish(control + LOST, number, NATIVE)
