// AVX2 with 256-bit VNNI: Alder Lake and later, Zen 5. Compiled everywhere, tested only where a processor has it.
#include "isa.h"
#if defined(COLDSTREAM_HAS_AVXVNNI)
#include <immintrin.h>
#include "simd.h"

TARGET_BEGIN("avx2,fma,f16c,avxvnni")
namespace coldstream::avxvnni {
constexpr int kBytes = 32;
#include "vector.inl"
#include "simd_avx2.inl"
constexpr int kVectors = 2, kTileTokens = 4, kOffset8 = 128;

// acc + the sums of four products, u8 · s8.
INLINE vi dot4(vi acc, vb weight, vb x) {
  return (vi)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)weight, (__m256i)x);
}
INLINE vi dot8(vi acc, vb weight, vb x) { return dot4(acc, weight, x); }

#include "kernels.inl"
}  // namespace coldstream::avxvnni
TARGET_END

namespace coldstream {
const Kernels avxvnni_kernels = avxvnni::table("avxvnni", avxvnni::attend);
}
#endif
