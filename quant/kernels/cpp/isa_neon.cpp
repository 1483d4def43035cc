// 64-bit Arm with the dot product extension: Cortex-A76, Neoverse N1, Apple M1 and later.
#if defined(__aarch64__)
#include "isa.h"
#include <arm_neon.h>
#include "simd.h"

#if defined(__clang__)
TARGET_BEGIN("dotprod")
#else
TARGET_BEGIN("arch=armv8.2-a+dotprod")
#endif
namespace coldstream::neon {
constexpr int kBytes = 16;
#include "vector.inl"
constexpr int kVectors = 4, kTileTokens = 4, kOffset8 = 0;

// acc + the sums of four products, s8 · s8: stored nibbles are below 16 and so positive as s8 too.
INLINE vi dot4(vi acc, vb weight, vb x) { return (vi)vdotq_s32((int32x4_t)acc, (int8x16_t)weight, (int8x16_t)x); }
INLINE vi dot8(vi acc, vb weight, vb x) { return dot4(acc, weight ^ 0x80, x); }

// Sums of neighbours: two of a's, then two of b's.
template <bool kSmall>
INLINE vi add_pairs(vi a, vi b) {
  return (vi)vpaddq_s32((int32x4_t)a, (int32x4_t)b);
}

#include "narrow.inl"
#include "kernels.inl"
}  // namespace coldstream::neon
TARGET_END

namespace coldstream {
const Kernels neon_kernels = neon::table("neon", neon::attend);
}
#endif
