// Vectors of kBytes bytes through the compiler's vector types: the part that is the same on every processor.
// Included inside a namespace per instruction set, after kBytes is defined.

constexpr int kLanes = kBytes / 4;
constexpr bool kPlanes = kBytes == 64;  // one token's activations for 2 bits lie in planes: see gemv_planes.inl
typedef float vf __attribute__((vector_size(kBytes)));
typedef int32_t vi __attribute__((vector_size(kBytes)));
typedef uint32_t vu __attribute__((vector_size(kBytes)));
typedef int16_t vs __attribute__((vector_size(kBytes)));
typedef uint8_t vb __attribute__((vector_size(kBytes)));
typedef uint16_t vhalf __attribute__((vector_size(kBytes / 2)));
typedef uint8_t vquarter __attribute__((vector_size(kBytes / 4)));
#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))

template <class V>
INLINE V load(const void* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

template <class V>
INLINE void store(void* to, V value) {
  __builtin_memcpy(to, &value, sizeof value);
}

// A vector that is wanted more than once: some compilers would load it again each time, and loads are what is scarce.
INLINE vb kept(vb value) {
#if defined(__x86_64__)
  asm("" : "+v"(value));
#endif
  return value;
}

// A product that what it is added to later must not be fused with.
INLINE vf unfused(vf value) {
#if defined(__x86_64__)
  asm("" : "+v"(value));
  return value;
#else
  return value > -4e5f ? value : vf{} - 4e5f;
#endif
}

INLINE vf splat(float value) { return value - vf{}; }  // + would turn -0 into 0, which costs an addition
INLINE vi splat(int32_t value) { return vi{} + value; }
INLINE vf smaller(vf a, vf b) { return a < b ? a : b; }
INLINE vf larger(vf a, vf b) { return a > b ? a : b; }
INLINE vi larger(vi a, vi b) { return a > b ? a : b; }
INLINE vf to_float(vi value) { return __builtin_convertvector(value, vf); }
INLINE vf widen(vhalf bf16) { return (vf)(__builtin_convertvector(bf16, vu) << 16); }

// 1.5 * 2^23: adding it to a float below 2^22 rounds to the nearest even integer and leaves it in the low bits.
constexpr float kRounder = 12582912.0f;
INLINE vi rounded(vf value) { return (vi)(value + kRounder) - (vi)splat(kRounder); }

INLINE float sum(vf value) {
  typedef float quad __attribute__((vector_size(16)));
  quad parts[kBytes / 16];
  __builtin_memcpy(parts, &value, kBytes);
  for (int half = kBytes / 32; half; half /= 2)
    for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
  return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}

INLINE int32_t largest(vi value) {
  int32_t lanes[kLanes];
  store(lanes, value);
  int32_t best = lanes[0];
  for (int i = 1; i < kLanes; ++i) best = lanes[i] > best ? lanes[i] : best;
  return best;
}

// `count` bytes and zeros after them.
INLINE vb copy_part(const void* from, int64_t count) {
  uint8_t some[kBytes] = {};
  __builtin_memcpy(some, from, size_t(count));
  return load<vb>(some);
}

// Reads every byte and nothing else: four independent sums hide the latency of adding.
static uint64_t checksum(const char* bytes, int64_t count) {
  vi a{}, b{}, c{}, d{};
  for (int64_t i = 0; i < count; i += 4 * kBytes) {
    __builtin_prefetch(bytes + i + 4096);
    if (kBytes < 64) __builtin_prefetch(bytes + i + 4096 + 2 * kBytes);
    a ^= load<vi>(bytes + i);
    b ^= load<vi>(bytes + i + kBytes);
    c ^= load<vi>(bytes + i + 2 * kBytes);
    d ^= load<vi>(bytes + i + 3 * kBytes);
  }
  vi all = a + b + c + d;
  uint64_t total = 1;
  for (int i = 0; i < kLanes; ++i) total += uint32_t(all[i]);
  return total;
}
