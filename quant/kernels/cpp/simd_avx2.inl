// What 256-bit vectors need beyond vector.inl, shared by avx2 and avxvnni.

// acc + the sums of the products of neighbours.
INLINE vi add_pair_products(vi acc, vs a, vs b) { return acc + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b); }

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
INLINE void part_rows(const vi (&rows)[2], vi (&halves)[2]) {
  halves[0] = (vi)_mm256_permute2x128_si256((__m256i)rows[0], (__m256i)rows[1], 0x20);
  halves[1] = (vi)_mm256_permute2x128_si256((__m256i)rows[0], (__m256i)rows[1], 0x31);
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

// Pairs of values of 2 or 3 bits, a byte each.
template <int kBits>
INLINE vb spread_pairs(const uint8_t* from, int64_t count) {
  uint8_t some[kBytes];
  if (count < kBytes) {
    __builtin_memset(some, 0, sizeof some);
    __builtin_memcpy(some, from, size_t(count * kBits / 4));
    from = some;
  }
  if constexpr (kBits == 2) {
    const __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)from));
    return (vb)_mm256_or_si256(x, _mm256_slli_epi16(x, 4));
  } else {
    // 12 bytes of each half; every 16 bits get the two bytes that hold their 12, those that begin within one moved up.
    const __m256i x = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)from)),
                                              _mm_loadu_si128((const __m128i*)(from + 8)), 1);
    const __m256i where = _mm256_setr_epi8(0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 10, 10, 11,  //
                                           4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11, 12, 13, 14, 14, 15);
    const __m256i up = _mm256_mullo_epi16(_mm256_shuffle_epi8(x, where), _mm256_set1_epi32(0x00010010));
    return (vb)_mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(up, 4), _mm256_set1_epi16(0x003f)),
                               _mm256_and_si256(_mm256_srli_epi16(up, 2), _mm256_set1_epi16(0x3f00)));
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
