// The tables that exist in this build; isa.cpp picks one that the processor can run.
#pragma once
#include "kernels.h"

namespace coldstream {
extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels, avx512_kernels;
#if defined(__clang__) ? __clang_major__ >= 9 : __GNUC__ >= 10
#define COLDSTREAM_HAS_AVX512BF16 1
extern const Kernels avx512bf16_kernels;  // avx512 with attention in bf16 dot products
#endif
#if defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11
#define COLDSTREAM_HAS_AVXVNNI 1
extern const Kernels avxvnni_kernels;
#endif
#elif defined(__aarch64__)
extern const Kernels neon_kernels;
#endif
}  // namespace coldstream
