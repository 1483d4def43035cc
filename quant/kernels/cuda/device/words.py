"""Packed words in registers: from an int32 of four, eight or sixteen weights to f32 values.

Weights of 3 bits come 32 in three words, the 11th and the 22nd of them across two. What kernels count are therefore
units: words, or threes of them at 3 bits.

A weight is turned into a float without a conversion instruction: its bits are masked where they lie, and the
exponent of a power of two is put above them. A field at bit ``s`` of the mantissa of 2^(23-s) makes the value
2^(23-s) + field, exactly, and subtracting 2^(23-s) + zero point leaves the weight. Per weight that is one or
two logic operations, one addition and one multiply-add; a shift is needed for the upper half of a word only
(the mantissa has 23 bits).

Budget: an RTX 4090 (128 SMs at 2.5 GHz, 1,008 GB/s) receives 6 weights of int4 per SM and clock and can issue
128 operations, 21 per weight; the loop needs about 5.
"""

import triton
import triton.language as tl


@triton.jit
def weight(words, i: tl.constexpr, BITS: tl.constexpr):
    """Element ``i`` of each packed word: f32 in -8..7 (4 bit) or -128..127 (8 bit), exact."""
    PER_HALF: tl.constexpr = 16 // BITS
    PLACE: tl.constexpr = (i % PER_HALF) * BITS
    MASK: tl.constexpr = ((1 << BITS) - 1) << PLACE
    EXPONENT: tl.constexpr = (127 + 23 - PLACE) << 23
    OFFSET: tl.constexpr = 2.0 ** (23 - PLACE) + 2.0 ** (BITS - 1)
    half = words if i < PER_HALF else words >> 16
    return ((half & MASK) | EXPONENT).to(tl.float32, bitcast=True) - OFFSET


@triton.jit
def weight_of_three(first, second, third, i: tl.constexpr):
    """Element ``i`` of each unit of three words of 3-bit weights: f32 in -4..3, exact."""
    BIT: tl.constexpr = 3 * i
    SHIFT: tl.constexpr = BIT % 32
    word = first if BIT < 32 else second if BIT < 64 else third
    if SHIFT > 29:  # the rest of it begins the next word
        after = second if BIT < 32 else third
        # Shifted in from the left comes the sign, which the masks take away.
        LOW: tl.constexpr = (1 << (32 - SHIFT)) - 1
        field = ((word >> SHIFT) & LOW) | ((after << (32 - SHIFT)) & (7 - LOW))
        PLACE: tl.constexpr = 0
    elif SHIFT > 20:
        field = (word >> 16) & (7 << (SHIFT - 16))
        PLACE: tl.constexpr = SHIFT - 16
    else:
        field = word & (7 << SHIFT)
        PLACE: tl.constexpr = SHIFT
    EXPONENT: tl.constexpr = (127 + 23 - PLACE) << 23
    return (field | EXPONENT).to(tl.float32, bitcast=True) - (2.0 ** (23 - PLACE) + 4.0)


@triton.jit
def activation(four, i: tl.constexpr):
    """bf16 number ``i`` of four in an int64, as f32."""
    half = four.to(tl.int32) if i < 2 else (four >> 32).to(tl.int32)
    bits = half << 16 if i % 2 == 0 else half & -65536
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def word_dot(words, first, second, BITS: tl.constexpr):
    """Σ over the weights of each word, ``[N, W]``, times the activations ``[W]`` opposite to them.

    ``first`` and ``second`` hold the activations of elements 0-3 and 4-7, bf16 in int64 (8 bit: ``first``).
    """
    total = weight(words, 0, BITS) * activation(first, 0)[None, :]
    for i in tl.static_range(1, 32 // BITS):
        four = first if i < 4 else second
        total += weight(words, i, BITS) * activation(four, i % 4)[None, :]
    return total


@triton.jit
def few_dot(first, second, third, x, unit, live, BITS: tl.constexpr):
    """``word_dot`` for units of 2 or 3 bits, whose activations ``x`` bf16 are loaded on the way, four at a time."""
    VALUES: tl.constexpr = 32 if BITS == 3 else 16
    fours = x.to(tl.pointer_type(tl.int64)) + unit * (VALUES // 4)
    four = tl.load(fours, mask=live, other=0)
    total = tl.zeros(first.shape, tl.float32)
    for i in tl.static_range(VALUES):
        if i % 4 == 0:
            four = tl.load(fours + i // 4, mask=live, other=0)
        value = weight_of_three(first, second, third, i) if BITS == 3 else weight(first, i, BITS)
        total += value * activation(four, i % 4)[None, :]
    return total


@triton.jit
def matrix(address, packed, scale, ALIGNMENT: tl.constexpr):
    """The packed words, whose alignment is known, and the scales that lie so many bytes from ``address``."""
    words = tl.multiple_of((address + packed).to(tl.pointer_type(tl.int32)), ALIGNMENT)
    return words, (address + scale).to(tl.pointer_type(tl.bfloat16))
