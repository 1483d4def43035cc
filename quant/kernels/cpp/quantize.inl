// Float weights to packed int2/int3/int4/int8, one pass: largest magnitude, scale, quantize, pack, error.
//
// scale = bf16(absmax / 1.5, 3.5, 7.5 or 127.5), rounded to nearest even; 1.0 where that is zero; q = round_half_even(w /
// scale) clamped to the kind's range. The same float operations as the torch reference, hence the same bits.

constexpr int32_t kInfinityBits = 0x7f800000;
constexpr int kColumns = 64;  // columns of one transposed block: two cache lines of bf16 per source row

INLINE vf half_to_float(vhalf half) {
  vu bits = __builtin_convertvector(half, vu);
  vu sign = (bits & 0x8000u) << 16, rest = (bits & 0x7fffu) << 13;
  vf scaled = (vf)rest * 5.192296858534828e33f;  // 2^112 rebiases the exponent, subnormals included
  vu finite = (vu)scaled, special = rest | 0x7f800000u;
  return (vf)(((bits & 0x7c00u) == 0x7c00u ? special : finite) | sign);
}

INLINE float half_to_float(uint16_t half) {
  uint16_t lanes[kLanes] = {half};
  return half_to_float(load<vhalf>(lanes))[0];
}

static void widen_run(const void* source, int32_t type, int64_t offset, int count, float* to) {
  int i = 0;
  if (type == kSourceF32) {
    __builtin_memcpy(to, static_cast<const float*>(source) + offset, size_t(count) * 4);
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(source) + offset;
  if (type == kSourceBf16) {
    for (; i + kLanes <= count; i += kLanes) store(to + i, widen(load<vhalf>(from + i)));
    for (; i < count; ++i) to[i] = bf16_to_float(from[i]);
  } else {
    for (; i + kLanes <= count; i += kLanes) store(to + i, half_to_float(load<vhalf>(from + i)));
    for (; i < count; ++i) to[i] = half_to_float(from[i]);
  }
}

INLINE vu bf16_bits(vf value) {
  vu bits = (vu)value;
  vu even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return even == 0u ? vu{} + 0x3f80u : even;
}

template <int kBits>
struct Range {
  static constexpr int kLow = -(1 << (kBits - 1)), kHigh = (1 << (kBits - 1)) - 1;
  static constexpr float kSpan = float(kHigh) + 0.5f;
};

// Stored values, a byte each, to packed bytes: eight of them fill kBits.
template <int kBits>
INLINE void pack_run(const uint8_t* values, int count, uint8_t* to) {
  if constexpr (kBits == 4) {
    uint8_t pairs[128];  // by itself, so that the loop becomes one of vectors
    for (int i = 0; i < count / 2; ++i) pairs[i] = uint8_t(values[2 * i] | values[2 * i + 1] << 4);
    __builtin_memcpy(to, pairs, size_t(count / 2));
    return;
  }
  for (int i = 0; i < count; i += 8, to += kBits) {
    uint32_t run = 0;
    for (int j = 0; j < 8; ++j) run |= uint32_t(values[i + j]) << (j * kBits);
    __builtin_memcpy(to, &run, kBits);
  }
}

// Value i of 32 that share kBits words, a lane for each row; a value may lie across two words.
template <int kBits>
INLINE void put_value(vu (&words)[kBits], int i, vu value) {
  const int word = i * kBits / 32, bit = i * kBits % 32;
  words[word] |= value << bit;
  if (bit + kBits > 32) words[word + 1] |= value >> (32 - bit);
}

// q of one vector, with its error added up. Clamping before rounding equals clamping after: the bounds are whole.
template <int kBits>
INLINE vi quantize_vector(vf value, vf scale, vf& error, vf& squares) {
  using R = Range<kBits>;
  vf ratio = larger(smaller(value / scale, splat(float(R::kHigh))), splat(float(R::kLow)));
  vi q = rounded(ratio);
  vf miss = value - to_float(q) * scale;
  error += miss * miss;
  squares += value * value;
  return q;
}

template <int kBits>
static void rows_as(const QuantizeJob& job, int64_t row0, int64_t row1, QuantizeStats* stats) {
  using R = Range<kBits>;
  const int group = job.group;
  const int64_t groups = job.k / group;
  alignas(64) float values[256];
  alignas(64) uint8_t bytes[256];
  for (int64_t row = row0; row < row1; ++row) {
    vf error{}, squares{};
    for (int64_t g = 0; g < groups; ++g) {
      widen_run(job.source, job.source_type, row * job.stride + g * group, group, values);
      vi top{};
      for (int i = 0; i < group; i += kLanes) top = larger(top, load<vi>(values + i) & 0x7fffffff);
      int32_t absmax_bits = largest(top);
      if (absmax_bits >= kInfinityBits) ++stats->nonfinite;
      vf absmax = (vf)splat(absmax_bits);
      vu scale_bits = bf16_bits(absmax / R::kSpan);
      job.scale[row * groups + g] = uint16_t(scale_bits[0]);
      vf scale = (vf)(scale_bits << 16);
      uint8_t* to = reinterpret_cast<uint8_t*>(job.packed) + (row * job.k + g * group) * kBits / 8;
      uint8_t* stored = kBits == 8 ? to : bytes;
      for (int i = 0; i < group; i += kLanes) {
        vi q = quantize_vector<kBits>(load<vf>(values + i), scale, error, squares) - R::kLow;
        store(stored + i, __builtin_convertvector(q, vquarter));
      }
      if constexpr (kBits < 8) pack_run<kBits>(bytes, group, to);
    }
    stats->squared_error += sum(error);
    stats->squared_sum += sum(squares);
  }
}

// One block of kColumns columns and one group of rows. The block is copied out on its first read: source rows
// lie a power of two apart and would evict each other from the cache before a second.
template <int kBits>
static void column_block(const QuantizeJob& job, int64_t column, int count, int64_t g, QuantizeStats* stats) {
  using R = Range<kBits>;
  constexpr int kVectors = kColumns / kLanes;
  const int group = job.group, words = group * kBits / 32;
  const int64_t groups = job.k / group, row_words = job.k * kBits / 32;
  alignas(64) float values[256][kColumns];
  alignas(64) uint32_t packed[64][kColumns];
  if (count < kColumns) __builtin_memset(values, 0, sizeof(float) * kColumns * size_t(group));
  vi top[kVectors] = {};
  for (int r = 0; r < group; ++r) {
    const int64_t offset = (g * group + r) * job.stride + column;
    widen_run(job.source, job.source_type, offset, count, values[r]);
    for (int v = 0; v < kVectors; ++v)
      top[v] = larger(top[v], load<vi>(values[r] + v * kLanes) & 0x7fffffff);
  }
  vf error{}, squares{};
  for (int v = 0; v < kVectors; ++v) {
    if (largest(top[v]) >= kInfinityBits) ++stats->nonfinite;
    vu scale_bits = bf16_bits((vf)top[v] / R::kSpan);
    vf scale = (vf)(scale_bits << 16);
    for (int i = 0; i < kLanes && v * kLanes + i < count; ++i)
      job.scale[(column + v * kLanes + i) * groups + g] = uint16_t(scale_bits[i]);
    for (int r = 0; r < group; r += 32) {
      vu run[kBits] = {};
      for (int i = 0; i < 32; ++i) {
        vf value = load<vf>(values[r + i] + v * kLanes);
        put_value<kBits>(run, i, (vu)(quantize_vector<kBits>(value, scale, error, squares) - R::kLow));
      }
      for (int w = 0; w < kBits; ++w) store(packed[r / 32 * kBits + w] + v * kLanes, run[w]);
    }
  }
  for (int c = 0; c < count; ++c) {
    uint32_t* to = job.packed + (column + c) * row_words + g * words;
    for (int w = 0; w < words; ++w) to[w] = packed[w][c];
  }
  stats->squared_error += sum(error);
  stats->squared_sum += sum(squares);
}

#include "search.inl"

static void quantize_rows(const QuantizeJob& job, int64_t row0, int64_t row1, QuantizeStats* stats) {
  if (job.kind == kInt8) rows_as<8>(job, row0, row1, stats);
  else if (job.kind == kInt4) (job.search ? search_rows<4> : rows_as<4>)(job, row0, row1, stats);
  else if (job.kind == kInt3) (job.search ? search_rows<3> : rows_as<3>)(job, row0, row1, stats);
  else (job.search ? search_rows<2> : rows_as<2>)(job, row0, row1, stats);
}

static void quantize_columns(const QuantizeJob& job, int64_t column0, int64_t column1, int64_t group0,
                             int64_t group1, QuantizeStats* stats) {
  for (int64_t g = group0; g < group1; ++g)
    for (int64_t column = column0; column < column1; column += kColumns) {
      int count = int(column1 - column < kColumns ? column1 - column : kColumns);
      if (job.kind == kInt8) column_block<8>(job, column, count, g, stats);
      else if (job.kind == kInt4) (job.search ? search_block<4> : column_block<4>)(job, column, count, g, stats);
      else if (job.kind == kInt3) (job.search ? search_block<3> : column_block<3>)(job, column, count, g, stats);
      else (job.search ? search_block<2> : column_block<2>)(job, column, count, g, stats);
    }
}
