// Rounding to 2, 3 or 4 bits with a searched scale, balanced against the mean of the input: see quant/rounding/search.py, which this
// equals to the bit. After the first product everything is integer arithmetic in 1/256 of a step, so that sums do
// not depend on the vectors' width.

// Scales tried, as parts of absmax / -kLow, of 32: fewer levels clip more.
template <int kBits>
struct Tried {
  static constexpr int kFirst = kBits == 4 ? 21 : kBits == 3 ? 16 : 12, kLast = kBits == 4 ? 34 : kBits == 3 ? 36 : 40;
};
constexpr float kLeastStep = 0x1p-100f;
constexpr int kThetaBits = 12, kMaxShift = 96, kRounds = 3;
constexpr int64_t kMaxTheta = 1 << 19;

INLINE vi smaller(vi a, vi b) { return a < b ? a : b; }
INLINE vi within(vi value, int32_t low, int32_t high) { return smaller(larger(value, splat(low)), splat(high)); }

INLINE int32_t total(vi value) {
  typedef int32_t quad __attribute__((vector_size(16)));
  quad parts[kBytes / 16];
  __builtin_memcpy(parts, &value, kBytes);
  for (int half = kBytes / 32; half; half /= 2)
    for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
  return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}

// The comparison does nothing to finite values; it keeps the product from being fused with what follows.
INLINE vi to_fixed(vf value, vf inverse) { return rounded(larger(value * inverse, splat(-4e5f))); }
template <int kBits>
INLINE vi level(vi fixed) {
  return within((fixed + 128) >> 8, Range<kBits>::kLow, Range<kBits>::kHigh);
}
template <int kBits>
INLINE vi squared_miss(vi fixed) {
  vi miss = fixed - (within(fixed + 128, Range<kBits>::kLow * 256, Range<kBits>::kHigh * 256 + 255) & ~255);
  return miss * miss;
}
INLINE vf inverse_of(vf scale) { return 1.0f / scale * 256.0f; }
INLINE vf widened(vu bits) { return (vf)(bits << 16); }
INLINE vi shift_of(vi theta, vi mean) { return within((theta * mean) >> kThetaBits, -kMaxShift, kMaxShift); }

struct Theta {  // Newton's method for one group; the best value so far is kept
  int64_t theta = 0, best = 0, least = int64_t(1) << 62;
  void seen(int64_t bias, int64_t norm, bool last) {
    const int64_t size = bias < 0 ? -bias : bias;
    if (size < least) least = size, best = theta;
    if (last) return;
    theta += bias * (1 << kThetaBits) / norm;
    theta = theta < -kMaxTheta ? -kMaxTheta : theta > kMaxTheta ? kMaxTheta : theta;
  }
};

// Two vectors as one of halves, in pairs (lane of a, lane of b); what is in 1/256 of a step fits.
INLINE vs pair_up(vi a, vi b) { return (vs)((a & 0xffff) | (b << 16)); }
INLINE vi first_of(vs pairs) { return (vi)pairs << 16 >> 16; }
INLINE vi second_of(vs pairs) { return (vi)pairs >> 16; }
INLINE vs within(vs value, int16_t low, int16_t high) {
  const vs least = vs{} + low, most = vs{} + high;
  value = value > least ? value : least;
  return value < most ? value : most;
}

// to_fixed of two vectors: after kRounder is added the low half of a float is the whole number.
INLINE vs to_fixed_pairs(vf a, vf b, vf inverse) {
  return pair_up((vi)(unfused(a * inverse) + kRounder), (vi)(unfused(b * inverse) + kRounder));
}

// The level nearest to value - 128, times 256.
template <int kBits>
INLINE vs level_below(vs value) {
  return within(value, Range<kBits>::kLow * 256, Range<kBits>::kHigh * 256 + 255) & int16_t(-256);
}

// The scale that leaves the least error of a group of finite values.
template <int kBits>
static float search_scale(const float* values, int group, float step) {
  constexpr int kFirst = Tried<kBits>::kFirst, kCount = Tried<kBits>::kLast - kFirst + 1;
  alignas(64) float tried[round_up(kCount, kLanes)], inverse[round_up(kCount, kLanes)], weight[round_up(kCount, kLanes)];
  for (int j = 0; j < kCount; j += kLanes) {
    vf fraction;
    for (int i = 0; i < kLanes; ++i) fraction[i] = float(kFirst + j + i) / 32;
    const vf scale = widened(bf16_bits(step * fraction)), ratio = scale / step;
    store(tried + j, scale);
    store(inverse + j, inverse_of(scale));
    store(weight + j, ratio * ratio);
  }
  float least = __builtin_inff(), best = 1.0f;
  for (int j = 0; j < kCount; ++j) {
    const vf factor = splat(inverse[j]);
    vi plus{}, minus{};
    for (int i = 0; i < group; i += 2 * kLanes) {
      const vs f = to_fixed_pairs(load<vf>(values + i), load<vf>(values + i + kLanes), factor);
      const vs miss = f - level_below<kBits>(f + int16_t(128)), other = f + level_below<kBits>(int16_t(128) - f);
      plus = add_pair_products(plus, miss, miss);
      minus = add_pair_products(minus, other, other);
    }
    const float up = float(total(plus)) * weight[j], down = float(total(minus)) * weight[j];
    if (up < least) least = up, best = tried[j];
    if (down < least) least = down, best = -tried[j];
  }
  return best;
}

template <int kBits>
static void search_rows(const QuantizeJob& job, int64_t row0, int64_t row1, QuantizeStats* stats) {
  constexpr int kPair = 2 * kLanes;
  const int group = job.group;
  const int64_t groups = job.k / group;
  alignas(64) float values[256];
  alignas(64) uint8_t bytes[256];
  vs fixed[256 / kPair], weights[256 / kPair];
  for (int64_t row = row0; row < row1; ++row) {
    vf error{}, squares{};
    for (int64_t g = 0; g < groups; ++g) {
      widen_run(job.source, job.source_type, row * job.stride + g * group, group, values);
      vi top{};
      for (int i = 0; i < group; i += kLanes) top = larger(top, load<vi>(values + i) & 0x7fffffff);
      const int32_t absmax_bits = largest(top);
      if (absmax_bits >= kInfinityBits) ++stats->nonfinite;
      const vf step = larger((vf)splat(absmax_bits) * (-1.0f / Range<kBits>::kLow), splat(kLeastStep));
      const vf scale = splat(search_scale<kBits>(values, group, step[0])), inverse = inverse_of(scale);
      for (int i = 0; i < group; i += kPair)
        fixed[i / kPair] = to_fixed_pairs(load<vf>(values + i), load<vf>(values + i + kLanes), inverse);
      const int32_t* means = job.means ? job.means + g * group : nullptr;
      Theta state;
      auto shifted = [&](int i, vi theta) {
        const vi first = (theta * load<vi>(means + i)) >> kThetaBits;
        const vi second = (theta * load<vi>(means + i + kLanes)) >> kThetaBits;
        return fixed[i / kPair] + within(pair_up(first, second), -kMaxShift, kMaxShift);
      };
      if (means) {
        vi norms{};
        for (int i = 0; i < group; i += kPair) {
          const vs mean = weights[i / kPair] = pair_up(load<vi>(means + i), load<vi>(means + i + kLanes));
          norms = add_pair_products(norms, mean, mean);
        }
        const int64_t norm = total(norms) > 1 ? total(norms) : 1;
        for (int round = 0; round <= kRounds; ++round) {
          const vi theta = splat(int32_t(state.theta));
          vi bias{};
          for (int i = 0; i < group; i += kPair) {
            const vs miss = fixed[i / kPair] - level_below<kBits>(shifted(i, theta) + int16_t(128));
            bias = add_pair_products(bias, miss, weights[i / kPair]);
          }
          state.seen(total(bias), norm, round == kRounds);
        }
      }
      const vi theta = splat(int32_t(state.best));
      for (int i = 0; i < group; i += kPair) {
        const vs q = level_below<kBits>((means ? shifted(i, theta) : fixed[i / kPair]) + int16_t(128)) >> 8;
        for (int half = 0; half < 2; ++half) {
          const int at = i + half * kLanes;
          const vi level = half ? second_of(q) : first_of(q);
          const vf value = load<vf>(values + at), miss = value - to_float(level) * scale;
          error += miss * miss;
          squares += value * value;
          store(bytes + at, __builtin_convertvector(level - Range<kBits>::kLow, vquarter));
        }
      }
      job.scale[row * groups + g] = absmax_bits ? uint16_t(uint32_t(((vi)scale)[0]) >> 16) : 0x3f80;
      uint8_t* to = reinterpret_cast<uint8_t*>(job.packed) + (row * job.k + g * group) * kBits / 8;
      pack_run<kBits>(bytes, group, to);
    }
    stats->squared_error += sum(error);
    stats->squared_sum += sum(squares);
  }
}

// One block of columns of a transposed source: a lane is a row of the weight.
template <int kBits>
static void search_block(const QuantizeJob& job, int64_t column, int count, int64_t g, QuantizeStats* stats) {
  constexpr int kVectors = kColumns / kLanes;
  const int group = job.group, words = group * kBits / 32;
  const int64_t groups = job.k / group, row_words = job.k * kBits / 32;
  alignas(64) float values[256][kColumns];
  alignas(64) int32_t fixed[256][kLanes];
  alignas(64) uint32_t packed[32][kColumns];
  if (count < kColumns) __builtin_memset(values, 0, sizeof(float) * kColumns * size_t(group));
  for (int r = 0; r < group; ++r)
    widen_run(job.source, job.source_type, (g * group + r) * job.stride + column, count, values[r]);
  const int32_t* means = job.means ? job.means + g * group : nullptr;
  int64_t norm = 0;
  for (int r = 0; means && r < group; ++r) norm += int64_t(means[r]) * means[r];
  if (norm < 1) norm = 1;
  vf error{}, squares{};
  for (int v = 0; v < kVectors; ++v) {
    const int lane0 = v * kLanes;
    vi top{};
    for (int r = 0; r < group; ++r) top = larger(top, load<vi>(values[r] + lane0) & 0x7fffffff);
    if (largest(top) >= kInfinityBits) ++stats->nonfinite;
    const vf step = larger((vf)top * (-1.0f / Range<kBits>::kLow), splat(kLeastStep));
    vf least = splat(__builtin_inff()), scale = splat(1.0f);
    for (int j = Tried<kBits>::kFirst; j <= Tried<kBits>::kLast; ++j) {
      const vf tried = widened(bf16_bits(step * (float(j) / 32))), inverse = inverse_of(tried), ratio = tried / step;
      vi plus{}, minus{};
      for (int r = 0; r < group; ++r) {
        const vi f = to_fixed(load<vf>(values[r] + lane0), inverse);
        plus += squared_miss<kBits>(f);
        minus += squared_miss<kBits>(-f);
      }
      const vf weight = ratio * ratio, up = to_float(plus) * weight, down = to_float(minus) * weight;
      scale = up < least ? tried : scale;
      least = up < least ? up : least;
      scale = down < least ? -tried : scale;
      least = down < least ? down : least;
    }
    const vf inverse = inverse_of(scale);
    for (int r = 0; r < group; ++r) store(fixed[r], to_fixed(load<vf>(values[r] + lane0), inverse));
    Theta states[kLanes];
    int32_t best[kLanes] = {}, next[kLanes] = {}, biases[kLanes];
    for (int round = 0; means && round <= kRounds; ++round) {
      const vi theta = load<vi>(next);
      vi bias{};
      for (int r = 0; r < group; ++r) {
        const vi f = load<vi>(fixed[r]);
        bias += (f - (level<kBits>(f + shift_of(theta, splat(means[r]))) << 8)) * means[r];
      }
      store(biases, bias);
      for (int i = 0; i < kLanes; ++i) {
        states[i].seen(biases[i], norm, round == kRounds);
        next[i] = int32_t(states[i].theta);
        best[i] = int32_t(states[i].best);
      }
    }
    const vi theta = load<vi>(best);
    for (int r0 = 0; r0 < group; r0 += 32) {
      vu run[kBits] = {};
      for (int i = 0; i < 32; ++i) {
        const int r = r0 + i;
        const vi f = load<vi>(fixed[r]);
        const vi q = level<kBits>(means ? f + shift_of(theta, splat(means[r])) : f);
        const vf value = load<vf>(values[r] + lane0), miss = value - to_float(q) * scale;
        error += miss * miss;
        squares += value * value;
        put_value<kBits>(run, i, (vu)(q - Range<kBits>::kLow));
      }
      for (int w = 0; w < kBits; ++w) store(packed[r0 / 32 * kBits + w] + lane0, run[w]);
    }
    const vu bits = (vu)scale >> 16;
    for (int i = 0; i < kLanes && lane0 + i < count; ++i)
      job.scale[(column + lane0 + i) * groups + g] = top[i] ? uint16_t(bits[i]) : 0x3f80;
  }
  for (int c = 0; c < count; ++c) {
    uint32_t* to = job.packed + (column + c) * row_words + g * words;
    for (int w = 0; w < words; ++w) to[w] = packed[w][c];
  }
  stats->squared_error += sum(error);
  stats->squared_sum += sum(squares);
}
