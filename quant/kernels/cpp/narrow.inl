// What 128-bit vectors need beyond vector.inl: a vector never spans two groups.

INLINE void join_quads(const vi (&quads)[1], vi (&dots)[1]) { dots[0] = quads[0]; }

INLINE void part_rows(const vi (&rows)[1], vi (&quarters)[1]) { quarters[0] = rows[0]; }

INLINE void transpose_four(vi (&m)[4]) {
  const vi a = m[0], b = m[1], c = m[2], d = m[3];
  for (int i = 0; i < 4; ++i) m[i] = vi{a[i], b[i], c[i], d[i]};
}

INLINE float sum_neighbours(vf value) { return (value[0] + value[1]) + (value[2] + value[3]); }

template <int kSpans>
INLINE vi every(const char*, int);

INLINE vb load_part(const void* from, int64_t count) { return copy_part(from, count); }

// Pairs of values of 2 or 3 bits, a byte each: a lane takes the 16 or 24 bits of four.
template <int kBits>
INLINE vb spread_pairs(const uint8_t* from, int64_t count) {
  uint32_t words[kBits] = {};
  __builtin_memcpy(words, from, size_t(count * kBits / 4));
  if constexpr (kBits == 2) {
    const vu x = vu{words[0], words[0] >> 16, words[1], words[1] >> 16};
    const vu y = (x & 0xffu) | (x << 8 & 0xff0000u);
    return (vb)(y | y << 4);
  } else {
    const vu x = vu{words[0], words[0] >> 24 | words[1] << 8, words[1] >> 16 | words[2] << 16, words[2] >> 8};
    return (vb)((x & 0x3fu) | (x << 2 & 0x3f00u) | (x << 4 & 0x3f0000u) | (x << 6 & 0x3f000000u));
  }
}

template <int kBits>
INLINE vb even_of(vb spread) {
  return spread & uint8_t((1 << kBits) - 1);
}
template <int kBits>
INLINE vb odd_of(vb spread) {
  return (vb)((vu)spread >> kBits) & uint8_t((1 << kBits) - 1);
}

#include "lanes.inl"

// acc + the sums of the products of neighbours.
INLINE vi add_pair_products(vi acc, vs a, vs b) {
  return acc + ((vi)a << 16 >> 16) * ((vi)b << 16 >> 16) + ((vi)a >> 16) * ((vi)b >> 16);
}
