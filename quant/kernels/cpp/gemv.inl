// Rows of a packed weight against up to kGemvTokens tokens: every weight byte is read once and unpacked once.
//
// What has 2 or 3 bits becomes a vector of nibbles in registers and goes the way of 4 bits: `byte` counts bytes as they
// were at 4 bits, `packed_bytes` says how many of them lie in memory.
//
// Within a group the products are whole numbers, which come out the same in any order. A step is a vector of packed
// bytes, or the group that is longer; groups of one step follow each other, and steps are added up as RunSums adds up
// vectors. Everything here and gemm keep to this order, so a row of y has the same bits for any number of tokens.
//   across: a row's products lie across vectors; those of kLanes steps are folded into one, a lane for each.
//   down, never one token: kLanes words of kLanes rows are transposed in registers, a lane for each row: nothing is
//   folded. That is less work for a few tokens, but kLanes rows at once come slower from the memory of some processors.

constexpr int64_t kAhead = 8192;  // bytes of prefetch distance: measured best from 1 to 16 KiB
constexpr int64_t kBlockAhead = 2048;  // and past the end of a block of rows, which is read column by column
constexpr int kAcross = kBytes == 64 ? 6 : 1;  // tokens for which there is a choice: fewer registers hold fewer sums
constexpr int kFewAcross = kAcross < 2 ? kAcross : 2;  // the same of 2 and 3 bits
constexpr int kScaleRun = 2 * kLanes;  // groups whose scales are transposed at a time

// kLanes rows of a weight; results of lanes before `skip` are somebody else's.
struct RowBlock {
  const uint8_t* packed;
  const uint16_t* scale;
  int64_t stride, scale_stride, bytes, groups;
  int skip, count;
  int64_t row;  // of lane 0

  // What comes next in memory, for the second-level cache; of a part of a wider weight, nothing new.
  const uint8_t* ahead() const { return stride == bytes ? packed + stride * kLanes + kBlockAhead : packed; }
};

// The compiler must not keep a pointer of its own for each of a block's rows.
#define OPAQUE(pointer) asm("" : "+r"(pointer))

// The rows as blocks. The last one begins earlier, among rows that are done already; a weight of fewer rows than
// lanes goes row by row, each in all lanes.
template <class Body>
INLINE void each_block(const Weight& w, int64_t row0, int64_t row1, Body&& body) {
  for (int64_t row = row0; row < row1;) {
    const bool whole = row1 >= kLanes;
    const int64_t first = !whole ? row : row + kLanes <= row1 ? row : row1 - kLanes;
    const RowBlock block{w.packed + first * w.stride(),
                         w.scale + first * w.scale_stride(),
                         whole ? w.stride() : 0,
                         whole ? w.scale_stride() : 0,
                         w.row_bytes(),
                         w.groups(),
                         int(row - first),
                         whole ? kLanes : 1,
                         first};
    body(block);
    row = first + block.count;
  }
}

// scales[i] = the rows' scales of group `first + i`.
INLINE void transpose_scales(const RowBlock& block, int64_t first, int count, float (&scales)[kScaleRun][kLanes]) {
  vi m[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    const uint16_t* from = block.scale + i * block.scale_stride + first;
    m[i] = count == kScaleRun ? load<vi>(from) : (vi)load_part(from, count * 2);
  }
  transpose(m);
  for (int i = 0; i < kLanes; ++i) {
    store(scales[2 * i], m[i] << 16);
    store(scales[2 * i + 1], (vu)m[i] & 0xffff0000u);
  }
}

INLINE void store_lanes(const RowBlock& block, vf value, float* y) {
  if (block.skip == 0 && block.count == kLanes) {
    store(y + block.row, value);
  } else {
    for (int i = block.skip; i < block.count; ++i) y[block.row + i] = value[i];
  }
}

template <int kBits>
struct Width {
  static constexpr int value = kBits;
};

// How a group lies in vectors of packed bytes: several of them in one, or one in several.
template <int kBits, int kGroup>
struct Form {
  static constexpr int kOffset = kBits == 8 ? kOffset8 : 1 << (kBits - 1);
  static constexpr int kBytesOfGroup = kBits == 8 ? kGroup : kGroup / 2;
  static constexpr int kSpans = kBytes > kBytesOfGroup ? kBytes / kBytesOfGroup : 1;
  static constexpr int kParts = kBytesOfGroup > kBytes ? kBytesOfGroup / kBytes : 1;
  static constexpr int kStep = kParts * kBytes;
  // The largest sum in a lane before lanes are added up; in 16 bits adding is cheaper.
  static constexpr int kLargest = kBits == 8 ? 1 << 20 : kParts * 8 * ((1 << kBits) - 1) * 127;
  static constexpr bool kSmall = kLargest < 1 << 15, kSmallPairs = kLargest < 1 << 14;
};

// Where the activations of packed byte `byte` lie; those of the high nibbles follow 64 further on.
template <int kBits>
INLINE int64_t activation_of(int64_t byte) {
  return kBits == 8 ? byte : byte / 64 * 128 + byte % 64;
}

INLINE vb splat_word(const int8_t* four) {
  int32_t word;
  __builtin_memcpy(&word, four, 4);
  return (vb)splat(word);
}

// Sums of the step at `byte` of a row over what shares a lane, for each token; `count` of its bytes are left. Packed
// bytes are unpacked once for all tokens.
template <int kBits, int kParts, int kTokens>
INLINE void step_dots(const uint8_t* from, int64_t count, const Activations& a, int64_t byte, vi (&dots)[kTokens]) {
  for (int t = 0; t < kTokens; ++t) dots[t] = vi{};
  for (int p = 0; p < kParts; ++p) {
    const uint8_t* at = from + packed_bytes<kBits>(byte + p * kBytes);
    const int8_t* x = a.q + activation_of<kBits>(byte + p * kBytes);
    vb even, odd;
    if constexpr (kBits == 8) even = as_stored<8>(at, count);
    else even_and_odd<kBits>(at, count, even, odd);
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t, x += a.q_stride) {
      if constexpr (kBits == 8) {
        dots[t] = dot8(dots[t], even, load<vb>(x));
      } else {
        dots[t] = dot4(dots[t], even, load<vb>(x));
        dots[t] = dot4(dots[t], odd, load<vb>(x + 64));
      }
    }
  }
}

// Four steps of each token: lane 4 i + j is what step j has in lanes 4 i to 4 i + 3.
template <int kBits, int kGroup, int kTokens>
INLINE void four_steps(const uint8_t* from, const Activations& a, int64_t byte, vi (&four)[kTokens]) {
  using F = Form<kBits, kGroup>;
  vi pairs[2][kTokens], dots[2][kTokens];
  for (int i = 0; i < 2; ++i, byte += 2 * F::kStep) {
    step_dots<kBits, F::kParts>(from, kBytes, a, byte, dots[0]);
    step_dots<kBits, F::kParts>(from, kBytes, a, byte + F::kStep, dots[1]);
    for (int t = 0; t < kTokens; ++t) pairs[i][t] = add_pairs<F::kSmall>(dots[0][t], dots[1][t]);
  }
  for (int t = 0; t < kTokens; ++t) four[t] = add_pairs<F::kSmallPairs>(pairs[0][t], pairs[1][t]);
}

// The same where the row ends: `bytes` are left.
template <int kBits, int kGroup, int kTokens>
static void last_steps(const uint8_t* from, const Activations& a, int64_t byte, int64_t bytes, vi (&four)[kTokens]) {
  using F = Form<kBits, kGroup>;
  vi dots[4][kTokens] = {};
  for (int i = 0; i < 4 && i * F::kStep < bytes; ++i)
    step_dots<kBits, F::kParts>(from, bytes - i * F::kStep, a, byte + i * F::kStep, dots[i]);
  for (int t = 0; t < kTokens; ++t)
    four[t] = add_pairs<false>(add_pairs<false>(dots[0][t], dots[1][t]), add_pairs<false>(dots[2][t], dots[3][t]));
}

// Sums of groups, lane by lane in kSpans vectors, times their scales: all of them together.
template <int kBits, int kSpans>
INLINE float scaled_sum(const vi (&dots)[kSpans], const vf (&weights)[kSpans], const int32_t* sum, const float* scale) {
  vf acc{};
  for (int s = 0; s < kSpans; ++s) {
    vi sums;
    vf factors;
    by_step<kSpans>(sum, s, sums);
    by_step<kSpans>(scale, s, factors);
    acc += to_float(dots[s] - Form<kBits, 128>::kOffset * sums) * (weights[s] * factors);
  }
  return sum_neighbours(acc);
}

// A few tokens against rows one after the other, in the order in which they lie, which hardware prefetches best.
template <int kBits, int kGroup, int kTokens>
static void gemv_across(const Weight& w, int64_t row0, int64_t row1, const Activations& a, float* y, int64_t ldy) {
  using F = Form<kBits, kGroup>;
  constexpr int kRun = kLanes * F::kSpans;  // groups of kLanes steps
  constexpr int64_t kFour = 4 * F::kStep;
  const int64_t here = prefetch_ahead[kBits == 8];
  const int64_t groups = w.groups(), bytes = groups * F::kBytesOfGroup;
  for (int64_t row = row0; row < row1; ++row) {
    const uint8_t* from = w.packed + row * w.stride();
    const uint16_t* scale = w.scale + row * w.scale_stride();
    float total[kTokens] = {};
    vi quads[kTokens][kLanes / 4], four[kTokens];
    auto finish = [&](int64_t g, const uint16_t* its_scale) __attribute__((always_inline)) {
      vf weights[F::kSpans];
      scales_by_step<F::kSpans>(its_scale, weights);
      for (int t = 0; t < kTokens; ++t) {
        vi dots[F::kSpans];
        join_quads(quads[t], dots);
        total[t] += scaled_sum<kBits>(dots, weights, a.sum + t * a.g_stride + g, a.scale + t * a.g_stride + g);
      }
    };
    auto take = [&](int i) __attribute__((always_inline)) {
      for (int t = 0; t < kTokens; ++t) quads[t][i] = four[t];
    };
    auto prefetch = [&](int64_t byte) __attribute__((always_inline)) {
      const uint8_t* at = from + packed_bytes<kBits>(byte);
      for (int line = 0; line < packed_bytes<kBits>(kFour); line += 64) __builtin_prefetch(at + line + here, 0, 2);
    };
    int64_t g = 0, byte = 0;
    for (; g + kRun <= groups; g += kRun) {
#pragma GCC unroll 1  // loads at few places, a row's stride apart: processors prefetch by place
      for (int i = 0; i < kLanes / 4; ++i, byte += kFour) {
        prefetch(byte);
        four_steps<kBits, kGroup>(from, a, byte, four);
        take(i);
      }
      finish(g, scale + g);
    }
    if (g < groups) {
      for (int t = 0; t < kTokens; ++t)
        for (vi& quad : quads[t]) quad = vi{};
      for (int i = 0; byte < bytes; ++i, byte += kFour) {
        prefetch(byte);
        if (byte + kFour <= bytes) four_steps<kBits, kGroup>(from, a, byte, four);
        else last_steps<kBits, kGroup>(from, a, byte, bytes - byte, four);
        take(i);
      }
      uint16_t some[kRun] = {};
      __builtin_memcpy(some, scale + g, size_t(groups - g) * 2);
      finish(g, some);
    }
    for (int t = 0; t < kTokens; ++t) y[t * ldy + row] = total[t];
  }
}

// kTokens tokens, whose sums stay in registers while words of a block of rows come by, transposed. While the words of one
// vector of each row are multiplied, those of the next are read and moved, a part after each quarter: done at once, that
// takes longer than processors look ahead, and the multipliers wait.
// kBits is 8 or 4. What has 2 or 3 bits, kNarrow, of which `bits` says how many, is unpacked to 4.
template <int kBits, bool kNarrow, int kGroup, int kTokens>
static void gemv_down(const RowBlock& block, int bits, const Activations& a, float* y, int64_t ldy, const uint8_t* ahead) {
  using F = Form<kBits, kGroup>;
  constexpr int kQuartersOfGroup = F::kBytesOfGroup / 16, kQuarters = kBytes / 16, kParts = 4 / kQuarters;
  constexpr int kRun = kQuarters < kQuartersOfGroup ? kQuarters : kQuartersOfGroup;  // of one group in one vector
  constexpr bool kEarly = !kNarrow && (F::kSpans == 1 || kBytes == 64);  // else there are no registers for it
  alignas(64) float scales[kScaleRun][kLanes];
  const int offset = kNarrow ? 1 << (bits - 1) : F::kOffset;
  const int64_t bytes = block.groups * F::kBytesOfGroup;
  int64_t byte = 0;
  vf acc[kTokens];
  RunSums<kTokens> sums;
  vi dot[kTokens], more[kTokens];  // two sums, whose additions need not wait for each other
  vi quarters[kQuarters][4], coming[kQuarters][4];
  auto read_as = [&](auto width, int part, int64_t at, int64_t count) __attribute__((always_inline)) {
    constexpr int kWidth = decltype(width)::value;
    vi rows[kQuarters], parts[kQuarters];
    const uint8_t* row = block.packed + packed_bytes<kWidth>(at) + part * block.stride;
    OPAQUE(row);
    for (int i = 0; i < kQuarters; ++i, row += 4 * block.stride) rows[i] = (vi)as_stored<kWidth>(row, count);
    for (int line = 0; line < packed_bytes<kWidth>(kQuarters * kBytes); line += 64)
      __builtin_prefetch(ahead + line, 0, 2);
    ahead += packed_bytes<kWidth>(kQuarters * kBytes);
    part_rows(rows, parts);
    for (int i = 0; i < kQuarters; ++i) coming[i][part] = parts[i];
  };
  // Rows part, part + 4, part + 8 ... of the vector at byte `at`, for `parts` of them; past the end, anything.
  auto read = [&](int part, int parts, int64_t at) __attribute__((always_inline)) {
    const int64_t from = at < bytes ? at : 0, left = bytes - from;
    auto read_parts = [&](auto width) __attribute__((always_inline)) {
      for (int i = 0; i < parts; ++i) read_as(width, part + i, from, left);
    };
    if constexpr (!kNarrow) read_parts(Width<kBits>{});
    else if (bits == 3) read_parts(Width<3>{});
    else read_parts(Width<2>{});
  };
  auto add = [&](int quarter) __attribute__((always_inline)) {
    const int8_t* q = a.q + activation_of<kBits>(byte + quarter * 16);
    vi words[4];
    for (int i = 0; i < 4; ++i) words[i] = quarters[quarter][i];
    transpose_four(words);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i, q += 4) {
      const vb packed = (vb)words[i];
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) {
        const int8_t* x = q + t * a.q_stride;
        if constexpr (kBits == 8) {
          vi& to = i % 2 ? more[t] : dot[t];
          to = dot8(to, packed, splat_word(x));
        } else {
          dot[t] = dot4(dot[t], low_nibbles(packed), splat_word(x));
          more[t] = dot4(more[t], high_nibbles(packed), splat_word(x + 64));
        }
      }
    }
  };
  // The quarters of one vector, from `first` on, and as many parts of what comes after it.
  auto add_some = [&](int first) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int i = 0; i < kRun; ++i) {
      add(first + i);
      if constexpr (kEarly) read((first + i) * kParts, kParts, byte + kBytes);
    }
  };
  auto take = [&]() __attribute__((always_inline)) {
    if constexpr (!kEarly) read(0, 4, byte);
    for (int i = 0; i < kQuarters; ++i)
      for (int part = 0; part < 4; ++part) quarters[i][part] = coming[i][part];
  };
  auto begin = [&](int64_t g) __attribute__((always_inline)) {
    for (int t = 0; t < kTokens; ++t) dot[t] = splat(-offset * a.sum[t * a.g_stride + g]);
    for (int t = 0; t < kTokens; ++t) more[t] = vi{};
  };
  auto finish = [&](int64_t g, const float* scale) __attribute__((always_inline)) {
    const vf ws = load<vf>(scale);
    for (int t = 0; t < kTokens; ++t)
      acc[t] += to_float(dot[t] + more[t]) * (ws * splat(a.scale[t * a.g_stride + g]));
  };
  if constexpr (kEarly) read(0, 4, 0);
  for (int64_t g0 = 0; g0 < block.groups; g0 += kScaleRun) {
    const int run = int(block.groups - g0 < kScaleRun ? block.groups - g0 : kScaleRun);
    transpose_scales(block, g0, run, scales);
    for (int first = 0; first < run; first += F::kSpans) {
      const int here = run - first < F::kSpans ? run - first : F::kSpans;
      for (int t = 0; t < kTokens; ++t) acc[t] = vf{};
      if constexpr (F::kSpans == 1) {
        begin(g0 + first);
        for (int p = 0; p < F::kParts; ++p, byte += kBytes) {
          take();
          add_some(0);
        }
        finish(g0 + first, scales[first]);
      } else {
        take();
#pragma GCC unroll 4
        for (int s = 0; s < F::kSpans; ++s) {
          if (s >= here) break;
          begin(g0 + first + s);
          add_some(s * kRun);
          finish(g0 + first + s, scales[first + s]);
        }
        byte += kBytes;
      }
      sums.add(acc);
    }
  }
  sums.finish();
  for (int t = 0; t < kTokens; ++t) store_lanes(block, sums.total[t], y + t * ldy);
}

#include "gemv_planes.inl"

template <int kBits, int kGroup, int kTokens>
static void gemv_some(const Weight& w, int64_t row0, int64_t row1, const Activations& a, int tokens, float* y,
                      int64_t ldy) {
  if constexpr (kTokens > 1) {
    if (tokens < kTokens) return gemv_some<kBits, kGroup, kTokens - 1>(w, row0, row1, a, tokens, y, ldy);
  }
  if constexpr (kTokens == 1 && kBits == 2 && kPlanes) return gemv_planes<kGroup>(w, row0, row1, a, y);
  if constexpr (kTokens <= (kBits < 4 ? kFewAcross : kAcross)) {
    if (kTokens <= across_tokens || kTokens == 1) return gemv_across<kBits, kGroup, kTokens>(w, row0, row1, a, y, ldy);
  }
  if constexpr (kTokens > 1) {
    constexpr int kWide = kBits == 8 ? 8 : 4;
    each_block(w, row0, row1, [&](const RowBlock& block) {
      gemv_down<kWide, (kBits < 4), kGroup, kTokens>(block, kBits, a, y, ldy, block.ahead());
    });
  }
}

template <int kBits>
static void gemv_groups(const Weight& w, int64_t row0, int64_t row1, const Activations& a, int tokens, float* y,
                        int64_t ldy) {
  switch (w.group) {
    case 32: return gemv_some<kBits, 32, kGemvTokens>(w, row0, row1, a, tokens, y, ldy);
    case 64: return gemv_some<kBits, 64, kGemvTokens>(w, row0, row1, a, tokens, y, ldy);
    case 128: return gemv_some<kBits, 128, kGemvTokens>(w, row0, row1, a, tokens, y, ldy);
    default: return gemv_some<kBits, 256, kGemvTokens>(w, row0, row1, a, tokens, y, ldy);
  }
}

static void gemv(const Weight& w, int64_t row0, int64_t row1, const Activations& a, int tokens, float* y,
                 int64_t ldy) {
  if (w.kind == kInt4) gemv_groups<4>(w, row0, row1, a, tokens, y, ldy);
  else if (w.kind == kInt3) gemv_groups<3>(w, row0, row1, a, tokens, y, ldy);
  else if (w.kind == kInt2) gemv_groups<2>(w, row0, row1, a, tokens, y, ldy);
  else gemv_groups<8>(w, row0, row1, a, tokens, y, ldy);
}
