// Dot products of bytes in registers and nothing else, at the rate of the instruction: what no product of weights exceeds.

constexpr int kPeakSums = 12;  // each waits for itself alone, which hides the latency

// What the compiler may not fold, move or leave out, whatever it holds.
#if defined(__x86_64__)
#define OPAQUE_VECTOR(value) asm volatile("" : "+v"(value))
#elif defined(__aarch64__)
#define OPAQUE_VECTOR(value) asm volatile("" : "+w"(value))
#else
#define OPAQUE_VECTOR(value) asm volatile("" : "+m"(value))
#endif

// Products of `rounds` rounds: how many were computed.
static int64_t dot_products(int64_t rounds) {
  vi sums[kPeakSums] = {};
  vb weight = vb{} + 7, x = vb{} + 3;
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kPeakSums; ++i) {
      OPAQUE_VECTOR(x);
      sums[i] = dot4(sums[i], weight, x);
    }
  }
  for (vi& sum : sums) OPAQUE_VECTOR(sum);
  return rounds * kPeakSums * kBytes;
}
