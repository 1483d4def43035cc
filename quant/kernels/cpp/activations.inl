// f32 activations to int8 per group: scale = absmax / 127, q = round_half_even(x / scale).
//
// A group with a NaN or an infinity gets a NaN scale, so that the error surfaces in the output instead of
// vanishing in an integer.

constexpr float kNothing = 1e-30f;  // an absmax below this is zero: its scale would lose its bits

static void quantize_activations(const float* x, int64_t k, int32_t kind, int32_t group, bool alone, int8_t* q,
                                 float* scale, int32_t* total) {
  const bool planes = kPlanes && alone && kind == kInt2;
  const int64_t groups = k / group, padded = round_up(k, 128);
  alignas(64) uint8_t bytes[256];
  const int64_t rest = round_up(groups, kGroupRun) - groups;
  __builtin_memset(scale + groups, 0, size_t(rest) * 4);
  __builtin_memset(total + groups, 0, size_t(rest) * 4);
  if (padded != k) __builtin_memset(q + padded - 128, 0, 128);
  if (planes && k % 256) __builtin_memset(q + k / 256 * 256, 0, 256);
  for (int64_t g = 0; g < groups; ++g) {
    const float* from = x + g * group;
    vi top{};
    for (int i = 0; i < group; i += kLanes) top = larger(top, load<vi>(from + i) & 0x7fffffff);
    const int32_t absmax_bits = largest(top);
    const float absmax = ((vf)splat(absmax_bits))[0];
    const bool finite = absmax_bits < kInfinityBits, some = finite && absmax > kNothing;
    const vf divisor = splat(some ? absmax / 127.0f : 1.0f);
    uint8_t* natural = kind == kInt8 ? reinterpret_cast<uint8_t*>(q) + g * group : bytes;
    vi sums{};
    for (int i = 0; i < group; i += kLanes) {
      vi value = some ? rounded(load<vf>(from + i) / divisor) : vi{};
      sums += value;
      store(natural + i, __builtin_convertvector(value, vquarter));
    }
    if (planes) {
      for (int i = 0; i < group; i += 4) {
        const int64_t first = g * group + i;
        int8_t* to = q + first / 256 * 256 + first % 256 / 4;
        for (int plane = 0; plane < 4; ++plane) to[64 * plane] = int8_t(bytes[i + plane]);
      }
    } else if (kind != kInt8) {
      for (int start = 0; start < group; start += 128) {
        const int64_t first = g * group + start;
        const int count = (group - start < 128 ? group - start : 128) / 2;
        int8_t* even = q + first / 128 * 128 + first % 128 / 2;
        for (int i = 0; i < count; ++i) {
          even[i] = int8_t(bytes[start + 2 * i]);
          even[64 + i] = int8_t(bytes[start + 2 * i + 1]);
        }
      }
    }
    int32_t sum_of_group = 0;
    for (int i = 0; i < kLanes; ++i) sum_of_group += sums[i];
    scale[g] = finite ? (some ? absmax / 127.0f : 0.0f) : __builtin_nanf("");
    total[g] = sum_of_group;
  }
}
