// Plain C++ for any processor: 16-byte vectors, which the compiler maps to what the baseline has.
#include "isa.h"

namespace coldstream::portable {
constexpr int kBytes = 16;
#include "vector.inl"
constexpr int kVectors = 2, kTileTokens = 4, kOffset8 = 0;

INLINE vi signed_byte(vi words, int index) { return (words << (24 - 8 * index)) >> 24; }

INLINE vi dot4(vi acc, vb weight, vb x) {
  for (int i = 0; i < 4; ++i) acc += signed_byte((vi)weight, i) * signed_byte((vi)x, i);
  return acc;
}

INLINE vi dot8(vi acc, vb weight, vb x) { return dot4(acc, weight ^ 0x80, x); }

// Sums of neighbours: two of a's, then two of b's.
template <bool kSmall>
INLINE vi add_pairs(vi a, vi b) {
  return vi{a[0] + a[1], a[2] + a[3], b[0] + b[1], b[2] + b[3]};
}

#include "narrow.inl"
#include "kernels.inl"
}  // namespace coldstream::portable

namespace coldstream {
const Kernels portable_kernels = portable::table("portable", portable::attend);
}
