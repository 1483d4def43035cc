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

// Lane i of the result is element lanes[i] of four floats, or of four bf16.
INLINE vf pick(__m128 four, vi lanes) {
  return (vf)_mm512_permutexvar_ps((__m512i)lanes, _mm512_broadcast_f32x4(four));
}
INLINE vf pick_float(const float* four, vi lanes) { return pick(_mm_loadu_ps(four), lanes); }
INLINE vf pick_bf16(uint64_t four, vi lanes) {
  __m128i wide = _mm_slli_epi32(_mm_cvtepu16_epi32(_mm_cvtsi64_si128(int64_t(four))), 16);
  return pick(_mm_castsi128_ps(wide), lanes);
}

INLINE void transpose(vi (&m)[kLanes]) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32((__m512i)m[i], (__m512i)m[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32((__m512i)m[i], (__m512i)m[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    __m512i even0 = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88), odd0 = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
    __m512i even1 = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
    __m512i odd1 = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
    m[i] = (vi)_mm512_shuffle_i32x4(even0, even1, 0x88);
    m[i + 8] = (vi)_mm512_shuffle_i32x4(even0, even1, 0xdd);
    m[i + 4] = (vi)_mm512_shuffle_i32x4(odd0, odd1, 0x88);
    m[i + 12] = (vi)_mm512_shuffle_i32x4(odd0, odd1, 0xdd);
  }
}
#include "kernels.inl"
}  // namespace coldstream::avx512
TARGET_END

namespace coldstream {
const Kernels avx512_kernels = avx512::table("avx512");
}
#endif
