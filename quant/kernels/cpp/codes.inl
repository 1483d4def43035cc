// Weights in others' codes to f32, bit for bit what the libraries that define them compute: see quant/sources. A factor of 16
// bits times a whole number is exact, so that no order of operations is lost by fusing them.

// Eight bits of e4m3 without infinities: below 8 they count 2^-9, 127 is no number.
INLINE vf float8(vi code) {
  const vi size = code & 0x7f;
  const vf usual = (vf)((size << 20) + (120 << 23)), small = to_float(size) * 0x1p-9f;
  const vi bits = (vi)(size < 8 ? small : usual);
  return (vf)((size == 127 ? splat(int32_t(0x7fc00000)) : bits) | ((code & 0x80) << 24));
}

static void widen_float8(const CodesJob& job, int64_t row) {
  const uint8_t* from = job.codes + row * job.columns;
  float* to = job.out + row * job.columns;
  const float* factors = job.factors + row * ((job.columns + job.width - 1) / job.width);
  if (job.width == 1) {
    int64_t i = 0;
    for (; i + kLanes <= job.columns; i += kLanes)
      store(to + i, float8(__builtin_convertvector(load<vquarter>(from + i), vi)) * load<vf>(factors + i));
    for (; i < job.columns; ++i) to[i] = (float8(splat(int32_t(from[i]))) * factors[i])[0];
    return;
  }
  for (int64_t first = 0; first < job.columns; first += job.width) {
    const int64_t last = first + job.width < job.columns ? first + job.width : job.columns;
    const vf factor = splat(factors[first / job.width]);
    int64_t i = first;
    for (; i + kLanes <= last; i += kLanes)
      store(to + i, float8(__builtin_convertvector(load<vquarter>(from + i), vi)) * factor);
    for (; i < last; ++i) to[i] = (float8(splat(int32_t(from[i]))) * factor)[0];
  }
}

INLINE float half_at(const uint8_t* from) {
  uint16_t bits;
  __builtin_memcpy(&bits, from, 2);
  return half_to_float(bits);
}

// Scales and minima of the eight groups of a block of Q4_K or Q5_K, 6 bits each.
static void scales_of(const uint8_t* from, float (&scale)[8], float (&least)[8]) {
  const float d = half_at(from), of_least = half_at(from + 2);
  const uint8_t *low = from + 4, *middle = low + 4, *high = middle + 4;
  for (int i = 0; i < 4; ++i) {
    scale[i] = d * float(low[i] & 63);
    least[i] = of_least * float(middle[i] & 63);
    scale[i + 4] = d * float((high[i] & 15) | (low[i] >> 2 & 48));
    least[i + 4] = of_least * float((high[i] >> 4) | (middle[i] >> 2 & 48));
  }
}

template <bool kFive>
static void widen_k(const uint8_t* from, float* to) {
  float scale[8], least[8];
  scales_of(from, scale, least);
  const uint8_t *fifth = from + 16, *nibbles = fifth + (kFive ? 32 : 0);
  for (int g = 0; g < 8; ++g) {
    const uint8_t* pairs = nibbles + g / 2 * 32;
    for (int i = 0; i < 32; ++i) {
      int code = g % 2 ? pairs[i] >> 4 : pairs[i] & 15;
      if constexpr (kFive) code |= (fifth[i] >> g & 1) << 4;
      to[g * 32 + i] = scale[g] * float(code) - least[g];
    }
  }
}

static void widen_q6_k(const uint8_t* from, float* to) {
  const float d = half_at(from + 208);
  const int8_t* scales = reinterpret_cast<const int8_t*>(from + 192);
  for (int g = 0; g < 8; ++g) {  // 32 values: two scales
    const uint8_t *low = from + g / 4 * 64 + g % 2 * 32, *high = from + 128 + g / 4 * 32;
    const int shift = g % 4 / 2 * 4, place = g % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      const float scale = d * float(scales[g * 2 + half]);
      for (int i = half * 16; i < half * 16 + 16; ++i)
        to[g * 32 + i] = scale * float(((low[i] >> shift & 15) | (high[i] >> place & 3) << 4) - 32);
    }
  }
}

static void widen_q8_0(const uint8_t* from, float* to) {
  const float d = half_at(from);
  for (int i = 0; i < 32; ++i) to[i] = float(int8_t(from[2 + i])) * d;
}

static void widen_codes(const CodesJob& job, int64_t row0, int64_t row1) {
  if (job.kind == kFloat8) {
    for (int64_t row = row0; row < row1; ++row) widen_float8(job, row);
    return;
  }
  const int64_t size = code_block_bytes(job.kind), weights = job.kind == kQ8_0 ? 32 : 256;
  const int64_t blocks = job.columns / weights;
  const auto one = job.kind == kQ8_0   ? widen_q8_0
                   : job.kind == kQ4_K ? widen_k<false>
                   : job.kind == kQ5_K ? widen_k<true>
                                       : widen_q6_k;
  for (int64_t block = row0 * blocks; block < row1 * blocks; ++block)
    one(job.codes + block * size, job.out + block * weights);
}
