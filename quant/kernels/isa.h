// The tables that exist in this build; isa.cpp picks one that the processor can run.
#pragma once
#include "kernels.h"

namespace coldstream {
extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels, avx512_kernels;
#endif
}  // namespace coldstream
