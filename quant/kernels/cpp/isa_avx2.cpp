// AVX2 with FMA: Haswell, Zen and later.
#if defined(__x86_64__)
#include "isa.h"
#include <immintrin.h>
#include "simd.h"

TARGET_BEGIN("avx2,fma,f16c")
namespace coldstream::avx2 {
constexpr int kBytes = 32;
#include "vector.inl"
#include "simd_avx2.inl"
constexpr int kVectors = 2, kTileTokens = 4, kOffset8 = 0;

// acc + the sums of four products. The 16-bit sums of pairs cannot saturate: weights below 16 here, and for int8
// |weight| <= 128 with the sign moved to x, 2 * 128 * 127 < 2^15.
INLINE vi dot4(vi acc, vb weight, vb x) {
  __m256i pairs = _mm256_maddubs_epi16((__m256i)weight, (__m256i)x);
  return acc + (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

INLINE vi dot8(vi acc, vb weight, vb x) {
  __m256i q = (__m256i)(weight ^ 0x80);
  return dot4(acc, (vb)_mm256_abs_epi8(q), (vb)_mm256_sign_epi8((__m256i)x, q));
}
#include "kernels.inl"
}  // namespace coldstream::avx2
TARGET_END

namespace coldstream {
const Kernels avx2_kernels = avx2::table("avx2", avx2::attend);
}
#endif
