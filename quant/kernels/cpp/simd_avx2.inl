// What 256-bit vectors need beyond vector.inl, shared by avx2 and avxvnni.

// Sums of neighbours as phaddd orders them: in every 128 bits two of a's, then two of b's.
template <bool kSmall>
INLINE vi add_pairs(vi a, vi b) {
  if constexpr (kSmall)  // what fits into 16 bits
    return (vi)_mm256_madd_epi16(_mm256_packs_epi32((__m256i)a, (__m256i)b), _mm256_set1_epi16(1));
  return (vi)_mm256_hadd_epi32((__m256i)a, (__m256i)b);
}

// quads[i] holds rows 4 i to 4 i + 3 in each of its halves: a half each for kSpans groups, in order.
INLINE void join_quads(const vi (&quads)[2], vi (&dots)[2]) {
  dots[0] = (vi)_mm256_permute2x128_si256((__m256i)quads[0], (__m256i)quads[1], 0x20);
  dots[1] = (vi)_mm256_permute2x128_si256((__m256i)quads[0], (__m256i)quads[1], 0x31);
}
INLINE void join_quads(const vi (&quads)[2], vi (&dots)[1]) {
  vi halves[2];
  join_quads(quads, halves);
  dots[0] = halves[0] + halves[1];
}

// quarters[s][i]: half s of rows i and i + 4.
INLINE void part_rows(const vi (&rows)[8], vi (&halves)[2][4]) {
  for (int i = 0; i < 4; ++i) {
    halves[0][i] = (vi)_mm256_permute2x128_si256((__m256i)rows[i], (__m256i)rows[i + 4], 0x20);
    halves[1][i] = (vi)_mm256_permute2x128_si256((__m256i)rows[i], (__m256i)rows[i + 4], 0x31);
  }
}

// Four rows of four words to four words of four rows, within every 128 bits.
INLINE void transpose_four(vi (&m)[4]) {
  const __m256i a = _mm256_unpacklo_epi32((__m256i)m[0], (__m256i)m[1]);
  const __m256i b = _mm256_unpackhi_epi32((__m256i)m[0], (__m256i)m[1]);
  const __m256i c = _mm256_unpacklo_epi32((__m256i)m[2], (__m256i)m[3]);
  const __m256i d = _mm256_unpackhi_epi32((__m256i)m[2], (__m256i)m[3]);
  m[0] = (vi)_mm256_unpacklo_epi64(a, c);
  m[1] = (vi)_mm256_unpackhi_epi64(a, c);
  m[2] = (vi)_mm256_unpacklo_epi64(b, d);
  m[3] = (vi)_mm256_unpackhi_epi64(b, d);
}

INLINE float sum_neighbours(vf value) {
  __m256 sum = (__m256)value;
  sum = _mm256_add_ps(sum, _mm256_permute_ps(sum, 0xb1));
  sum = _mm256_add_ps(sum, _mm256_permute_ps(sum, 0x4e));
  return _mm_cvtss_f32(_mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1)));
}

// Word `part` of each of 8 adjacent pairs of words.
template <int kSpans>
INLINE vi every(const char* from, int part) {
  static_assert(kSpans == 2);
  const __m256 a = (__m256)load<vi>(from), b = (__m256)load<vi>(from + 32);
  const __m256 some = part ? _mm256_shuffle_ps(a, b, 0xdd) : _mm256_shuffle_ps(a, b, 0x88);
  return (vi)_mm256_permute4x64_epi64((__m256i)some, 0xd8);
}

INLINE vb load_part(const void* from, int64_t count) { return copy_part(from, count); }

#include "lanes.inl"
