// Plain C++ for any processor: 16-byte vectors, which the compiler maps to what the baseline has.
#include "isa.h"

namespace coldstream::portable {
constexpr int kBytes = 16;
#include "vector.inl"
#include "quantize.inl"
#include "table.inl"
}  // namespace coldstream::portable

namespace coldstream {
const Kernels portable_kernels = portable::table("portable");
}
