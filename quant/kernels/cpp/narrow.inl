// What 128-bit vectors need beyond vector.inl: a vector never spans two groups.

INLINE void join_quads(const vi (&quads)[1], vi (&dots)[1]) { dots[0] = quads[0]; }

INLINE void part_rows(const vi (&rows)[4], vi (&quarters)[1][4]) {
  for (int i = 0; i < 4; ++i) quarters[0][i] = rows[i];
}

INLINE void transpose_four(vi (&m)[4]) {
  const vi a = m[0], b = m[1], c = m[2], d = m[3];
  for (int i = 0; i < 4; ++i) m[i] = vi{a[i], b[i], c[i], d[i]};
}

INLINE float sum_neighbours(vf value) { return (value[0] + value[1]) + (value[2] + value[3]); }

template <int kSpans>
INLINE vi every(const char*, int);

INLINE vb load_part(const void* from, int64_t count) { return copy_part(from, count); }

#include "lanes.inl"
