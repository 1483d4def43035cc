// AVX2 with FMA: Haswell, Zen and later.
#if defined(__x86_64__)
#include "isa.h"
#include <immintrin.h>
#include "simd.h"

TARGET_BEGIN("avx2,fma,f16c")
namespace coldstream::avx2 {
constexpr int kBytes = 32;
#include "vector.inl"
#include "quantize.inl"
#include "table.inl"
}  // namespace coldstream::avx2
TARGET_END

namespace coldstream {
const Kernels avx2_kernels = avx2::table("avx2");
}
#endif
