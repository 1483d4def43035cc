// AVX-512 with VNNI: Ice Lake, Zen 4 and later.
#if defined(__x86_64__)
#include "isa.h"
#include <immintrin.h>
#include "simd.h"

TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx2,fma,f16c,prefer-vector-width=512")
namespace coldstream::avx512 {
constexpr int kBytes = 64;
#include "vector.inl"
#include "quantize.inl"
#include "table.inl"
}  // namespace coldstream::avx512
TARGET_END

namespace coldstream {
const Kernels avx512_kernels = avx512::table("avx512");
}
#endif
