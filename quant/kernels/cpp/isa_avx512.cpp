// AVX-512 with VNNI: Ice Lake, Zen 4 and later.
#if defined(__x86_64__)
#include "isa.h"
#include <immintrin.h>
#include "simd.h"

TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx2,fma,f16c,prefer-vector-width=512")
namespace coldstream::avx512 {
constexpr int kBytes = 64;
#include "vector.inl"
constexpr int kVectors = 2, kTileTokens = 6, kOffset8 = 128;

// acc + the sums of four products, u8 · s8.
INLINE vi dot4(vi acc, vb weight, vb x) { return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)weight, (__m512i)x); }
INLINE vi dot8(vi acc, vb weight, vb x) { return dot4(acc, weight, x); }

// acc + the sums of the products of neighbours.
INLINE vi add_pair_products(vi acc, vs a, vs b) {
  return (vi)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
}

// Sums of neighbours as phaddd orders them: in every 128 bits two of a's, then two of b's.
template <bool kSmall>
INLINE vi add_pairs(vi a, vi b) {
  if constexpr (kSmall)  // what fits into 16 bits
    return (vi)_mm512_madd_epi16(_mm512_packs_epi32((__m512i)a, (__m512i)b), _mm512_set1_epi16(1));
  const __m512 first = (__m512)a, second = (__m512)b;
  return (vi)_mm512_shuffle_ps(first, second, 0x88) + (vi)_mm512_shuffle_ps(first, second, 0xdd);
}

// quads[i] holds rows 4 i to 4 i + 3 in each of its quarters: a quarter each for kSpans groups, in order.
INLINE void join_quads(const vi (&quads)[4], vi (&dots)[4]) {
  const __m512i *q = (const __m512i*)quads;
  const __m512i a = _mm512_shuffle_i32x4(q[0], q[1], 0x44), b = _mm512_shuffle_i32x4(q[2], q[3], 0x44);
  const __m512i c = _mm512_shuffle_i32x4(q[0], q[1], 0xee), d = _mm512_shuffle_i32x4(q[2], q[3], 0xee);
  dots[0] = (vi)_mm512_shuffle_i32x4(a, b, 0x88);
  dots[1] = (vi)_mm512_shuffle_i32x4(a, b, 0xdd);
  dots[2] = (vi)_mm512_shuffle_i32x4(c, d, 0x88);
  dots[3] = (vi)_mm512_shuffle_i32x4(c, d, 0xdd);
}
INLINE vi add_halves(vi a, vi b) {
  return (vi)_mm512_shuffle_i32x4((__m512i)a, (__m512i)b, 0x88) +
         (vi)_mm512_shuffle_i32x4((__m512i)a, (__m512i)b, 0xdd);
}
INLINE void join_quads(const vi (&quads)[4], vi (&dots)[2]) {
  const __m512i a = (__m512i)add_halves(quads[0], quads[1]), b = (__m512i)add_halves(quads[2], quads[3]);
  dots[0] = (vi)_mm512_shuffle_i32x4(a, b, 0x88);
  dots[1] = (vi)_mm512_shuffle_i32x4(a, b, 0xdd);
}
INLINE void join_quads(const vi (&quads)[4], vi (&dots)[1]) {
  dots[0] = add_halves(add_halves(quads[0], quads[1]), add_halves(quads[2], quads[3]));
}

// Sums of planes, a vector of 256 values in four quarters of 64. Of groups of 32 sums[i] has in each quarter two groups of
// vector 2 i and two of vector 2 i + 1; of larger ones, the quarters of vectors 4 i to 4 i + 3.
template <int kGroup, int kSums, int kSpans>
INLINE void join_planes(const vi (&sums)[kSums], vi (&dots)[kSpans]) {
  const __m512i* of = (const __m512i*)sums;
  const __m512i even = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 16, 24, 17, 25, 18, 26, 19, 27);
  const __m512i odd = _mm512_setr_epi32(4, 12, 5, 13, 6, 14, 7, 15, 20, 28, 21, 29, 22, 30, 23, 31);
  if constexpr (kGroup == 256) {
    join_quads(sums, dots);
  } else if constexpr (kGroup == 128) {
    dots[0] = (vi)_mm512_permutex2var_epi32(of[0], even, of[1]) + (vi)_mm512_permutex2var_epi32(of[0], odd, of[1]);
  } else if constexpr (kGroup == 64) {
    dots[0] = (vi)_mm512_permutex2var_epi32(of[0], even, of[1]);
    dots[1] = (vi)_mm512_permutex2var_epi32(of[0], odd, of[1]);
  } else {
    const __m512i low = _mm512_setr_epi32(0, 8, 2, 10, 16, 24, 18, 26, 1, 9, 3, 11, 17, 25, 19, 27);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(4));
    for (int half = 0; half < 2; ++half) {
      const __m512i where = half ? high : low;
      const __m512i first = _mm512_permutex2var_epi32(of[0], where, of[1]);
      const __m512i second = _mm512_permutex2var_epi32(of[2], where, of[3]);
      dots[2 * half] = (vi)_mm512_shuffle_i64x2(first, second, 0x44);
      dots[2 * half + 1] = (vi)_mm512_shuffle_i64x2(first, second, 0xee);
    }
  }
}

// quarters[s]: quarter s of each of four rows.
INLINE void part_rows(const vi (&rows)[4], vi (&quarters)[4]) {
  const __m512i a = _mm512_shuffle_i32x4((__m512i)rows[0], (__m512i)rows[1], 0x44);
  const __m512i b = _mm512_shuffle_i32x4((__m512i)rows[2], (__m512i)rows[3], 0x44);
  const __m512i c = _mm512_shuffle_i32x4((__m512i)rows[0], (__m512i)rows[1], 0xee);
  const __m512i d = _mm512_shuffle_i32x4((__m512i)rows[2], (__m512i)rows[3], 0xee);
  quarters[0] = (vi)_mm512_shuffle_i32x4(a, b, 0x88);
  quarters[1] = (vi)_mm512_shuffle_i32x4(a, b, 0xdd);
  quarters[2] = (vi)_mm512_shuffle_i32x4(c, d, 0x88);
  quarters[3] = (vi)_mm512_shuffle_i32x4(c, d, 0xdd);
}

// Four rows of four words to four words of four rows, within every 128 bits.
INLINE void transpose_four(vi (&m)[4]) {
  const __m512i a = _mm512_unpacklo_epi32((__m512i)m[0], (__m512i)m[1]);
  const __m512i b = _mm512_unpackhi_epi32((__m512i)m[0], (__m512i)m[1]);
  const __m512i c = _mm512_unpacklo_epi32((__m512i)m[2], (__m512i)m[3]);
  const __m512i d = _mm512_unpackhi_epi32((__m512i)m[2], (__m512i)m[3]);
  m[0] = (vi)_mm512_unpacklo_epi64(a, c);
  m[1] = (vi)_mm512_unpackhi_epi64(a, c);
  m[2] = (vi)_mm512_unpacklo_epi64(b, d);
  m[3] = (vi)_mm512_unpackhi_epi64(b, d);
}

INLINE float sum_neighbours(vf value) {
  __m512 sum = (__m512)value;
  sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0xb1));
  sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0x4e));
  sum = _mm512_add_ps(sum, _mm512_shuffle_f32x4(sum, sum, 0xb1));
  return _mm512_cvtss_f32(_mm512_add_ps(sum, _mm512_shuffle_f32x4(sum, sum, 0x4e)));
}

// Word `part` of each of 16 adjacent pairs or fours of words.
template <int kSpans>
INLINE vi every(const char* from, int part) {
  const __m512i pairs = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  if constexpr (kSpans == 2)
    return (vi)_mm512_permutex2var_epi32(_mm512_loadu_si512(from), _mm512_add_epi32(pairs, _mm512_set1_epi32(part)),
                                         _mm512_loadu_si512(from + 64));
  else
    return (vi)_mm512_permutex2var_epi32((__m512i)every<2>(from, part % 2),
                                         _mm512_add_epi32(pairs, _mm512_set1_epi32(part / 2)),
                                         (__m512i)every<2>(from + 128, part % 2));
}

INLINE vb load_part(const void* from, int64_t count) {
  return (vb)_mm512_maskz_loadu_epi8(~uint64_t(0) >> (64 - count), from);
}

// The bits of eight pairs of values of 2 or 3 bits in every 64 bits.
template <int kBits>
INLINE vb spread_pairs(const uint8_t* from, int64_t count) {
  if constexpr (kBits == 2) {
    const __m256i x = _mm256_maskz_loadu_epi8(uint32_t(~uint64_t(0) >> (64 - count / 2)), from);
    return (vb)_mm512_cvtepu32_epi64(x);
  } else {
    const __m512i x = _mm512_maskz_loadu_epi8(~uint64_t(0) >> (64 - count / 4 * 3), from);
    alignas(64) static constexpr uint8_t kWhere[64] = {
        0,  1,  2,  3,  4,  5,  5,  5,  6,  7,  8,  9,  10, 11, 11, 11, 12, 13, 14, 15, 16, 17, 17, 17, 18, 19, 20, 21,
        22, 23, 23, 23, 24, 25, 26, 27, 28, 29, 29, 29, 30, 31, 32, 33, 34, 35, 35, 35, 36, 37, 38, 39, 40, 41, 41, 41,
        42, 43, 44, 45, 46, 47, 47, 47};
    return (vb)_mm512_permutexvar_epi8(_mm512_load_si512(kWhere), x);
  }
}

// Eight bits from each of the eight places in every 64 bits, of which kBits are wanted.
template <int kBits>
INLINE vb picked(vb spread, uint64_t places) {
  return (vb)_mm512_multishift_epi64_epi8(_mm512_set1_epi64(int64_t(places)), (__m512i)spread) & uint8_t((1 << kBits) - 1);
}
template <int kBits>
INLINE vb even_of(vb spread) {
  return picked<kBits>(spread, kBits == 2 ? 0x1c1814100c080400 : 0x2a241e18120c0600);
}
template <int kBits>
INLINE vb odd_of(vb spread) {
  return picked<kBits>(spread, kBits == 2 ? 0x1e1a16120e0a0602 : 0x2d27211b150f0903);
}

#include "lanes.inl"
#include "kernels.inl"
#include "attend_int8.inl"
#include "turned.inl"
}  // namespace coldstream::avx512
TARGET_END

#if defined(COLDSTREAM_HAS_AVX512BF16)
TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512bf16,avx2,fma,f16c,prefer-vector-width=512")
namespace coldstream::avx512 {
#include "attend_bf16.inl"
}
TARGET_END
#endif

namespace coldstream {
const Kernels avx512_kernels = avx512::table("avx512", avx512::attend_plain_or_bytes, avx512::turned);
#if defined(COLDSTREAM_HAS_AVX512BF16)
const Kernels avx512bf16_kernels = avx512::table("avx512bf16", avx512::attend_pairs, avx512::turned);
#endif
}
#endif
