// f32 activations against any kind of weight: widened to f32 in the cache, multiplied in registers.

constexpr int kDenseByRow = 16;      // up to this many tokens a panel does not pay
constexpr int64_t kRowSpan = 2048;   // columns of one row widened at a time
constexpr int64_t kPanelSpan = 512;  // columns of a panel widened and transposed at a time: fits the second-level cache

// kLanes nibbles in their order: every lane takes the word that holds its own and shifts it down.
INLINE vi nibbles(const uint8_t* from) {
  vu lane{};
  for (int i = 0; i < kLanes; ++i) lane[i] = uint32_t(i);
  uint32_t words[2] = {};
  __builtin_memcpy(words, from, kLanes / 2);
  vu word = vu{} + words[0];
  if constexpr (kLanes > 8) word = lane < 8u ? word : vu{} + words[1];
  return (vi)(word >> (lane % 8u * 4u) & 15u);
}

// Eight values of 2 or 3 bits in their order.
template <int kBits>
INLINE void widen_eight(const uint8_t* from, float scale, float* to) {
  uint32_t run = 0;
  __builtin_memcpy(&run, from, kBits);
  for (int j = 0; j < 8; ++j) to[j] = float(int(run >> (j * kBits) & ((1u << kBits) - 1)) - (1 << (kBits - 1))) * scale;
}

static void widen_row(const Weight& w, int64_t row, int64_t first, int64_t count, float* to) {
  if (w.kind == kF32) {
    __builtin_memcpy(to, w.packed + row * w.stride() + first * 4, size_t(count) * 4);
  } else if (!w.is_packed()) {
    widen_run(w.packed + row * w.stride(), w.kind == kF16 ? kSourceF16 : kSourceBf16, first, int(count), to);
  } else {
    const uint16_t* scale = w.scale + row * w.scale_stride();
    const uint8_t* from = w.packed + row * w.stride() + w.bytes(first);
    const int shift = __builtin_ctz(unsigned(w.group));
    for (int64_t i = 0; i < count; i += 32) {  // 32 divides every group size
      const float s = bf16_to_float(scale[(first + i) >> shift]);
      if (w.kind == kInt4) {
        for (int j = 0; j < 32; j += kLanes)
          store(to + i + j, to_float(nibbles(from + (i + j) / 2) - 8) * splat(s));
      } else if (w.kind == kInt3) {
        for (int j = 0; j < 32; j += 8) widen_eight<3>(from + (i + j) / 8 * 3, s, to + i + j);
      } else if (w.kind == kInt2) {
        for (int j = 0; j < 32; j += 8) widen_eight<2>(from + (i + j) / 8 * 2, s, to + i + j);
      } else {
        for (int j = 0; j < 32; ++j) to[i + j] = float(int(from[i + j]) - 128) * s;
      }
    }
  }
}

template <int kTokens, class Element>
INLINE void add_products(const Element* row, const float* x, int64_t ldx, int64_t count, vf (&acc)[kTokens],
                         float (&rest)[kTokens]) {
  constexpr int kUnroll = 64 / int(sizeof(Element)) / kLanes > 0 ? 64 / int(sizeof(Element)) / kLanes : 1;
  int64_t i = 0;
  for (; i + kUnroll * kLanes <= count; i += kUnroll * kLanes) {
    __builtin_prefetch(reinterpret_cast<const char*>(row + i) + kAhead);
    for (int u = 0; u < kUnroll; ++u) {
      vf value;
      if constexpr (sizeof(Element) == 2) value = widen(load<vhalf>(row + i + u * kLanes));
      else value = load<vf>(row + i + u * kLanes);
      for (int t = 0; t < kTokens; ++t) acc[t] += value * load<vf>(x + t * ldx + i + u * kLanes);
    }
  }
  for (; i < count; ++i) {
    float value;
    if constexpr (sizeof(Element) == 2) value = bf16_to_float(row[i]);
    else value = row[i];
    for (int t = 0; t < kTokens; ++t) rest[t] += value * x[t * ldx + i];
  }
}

// A few tokens: plain rows straight from memory, packed ones and f16 through a buffer.
template <int kTokens>
static void dense_rows(const Weight& w, int64_t row0, int64_t row1, const float* x, int64_t ldx, float* y,
                       int64_t ldy) {
  alignas(64) float buffer[kRowSpan];
  for (int64_t row = row0; row < row1; ++row) {
    vf acc[kTokens] = {};
    float rest[kTokens] = {};
    const uint8_t* from = w.packed + row * w.stride();
    if (w.kind == kBf16) {
      add_products<kTokens>(reinterpret_cast<const uint16_t*>(from), x, ldx, w.k, acc, rest);
    } else if (w.kind == kF32) {
      add_products<kTokens>(reinterpret_cast<const float*>(from), x, ldx, w.k, acc, rest);
    } else {
      for (int64_t first = 0; first < w.k; first += kRowSpan) {
        const int64_t count = w.k - first < kRowSpan ? w.k - first : kRowSpan;
        widen_row(w, row, first, count, buffer);
        add_products<kTokens>(buffer, x + first, ldx, count, acc, rest);
      }
    }
    for (int t = 0; t < kTokens; ++t) y[t * ldy + row] = sum(acc[t]) + rest[t];
  }
}

template <int kTokens>
static void dense_tile(const float* panel, int64_t stride, const float* x, int64_t ldx, int64_t columns, bool first,
                       int count, float* y, int64_t ldy) {
  vf acc[kTokens][kVectors] = {};
  for (int64_t k = 0; k < columns; ++k)
    for (int t = 0; t < kTokens; ++t)
      for (int v = 0; v < kVectors; ++v) acc[t][v] += load<vf>(panel + k * stride + v * kLanes) * splat(x[t * ldx + k]);
  for (int t = 0; t < kTokens; ++t) {
    alignas(64) float row[kPanelRows];
    for (int v = 0; v < kVectors; ++v) store(row + v * kLanes, acc[t][v]);
    for (int i = 0; i < count; ++i) y[t * ldy + i] = first ? row[i] : y[t * ldy + i] + row[i];
  }
}

template <int kTokens>
INLINE void dense_rest(const float* panel, int64_t stride, const float* x, int64_t ldx, int64_t columns, bool first,
                       int count, int tokens, float* y, int64_t ldy) {
  if constexpr (kTokens > 0) {
    if (tokens == kTokens) dense_tile<kTokens>(panel, stride, x, ldx, columns, first, count, y, ldy);
    else dense_rest<kTokens - 1>(panel, stride, x, ldx, columns, first, count, tokens, y, ldy);
  }
}

// y[t][i] (+)= sum over k of x[t][k] * panel[k][i] for i < count, panel rows `stride` floats apart; kPanelRows of
// a row are read.
static void dense_tiles(const float* panel, int64_t stride, const float* x, int64_t ldx, int64_t columns, bool first,
                        int count, int tokens, float* y, int64_t ldy) {
  for (; tokens >= kTileTokens; tokens -= kTileTokens, x += kTileTokens * ldx, y += kTileTokens * ldy)
    dense_tile<kTileTokens>(panel, stride, x, ldx, columns, first, count, y, ldy);
  dense_rest<kTileTokens - 1>(panel, stride, x, ldx, columns, first, count, tokens, y, ldy);
}

// Many tokens: a panel of rows transposed, so that a lane is an out feature.
static void dense_panel(const Weight& w, int64_t row, int count, const float* x, int64_t ldx, int tokens, float* y,
                        int64_t ldy) {
  alignas(64) float panel[kPanelSpan][kPanelRows];
  alignas(64) float lane[kLanes][kPanelSpan];
  y += row;
  for (int64_t first = 0; first < w.k; first += kPanelSpan) {
    const int64_t columns = w.k - first < kPanelSpan ? w.k - first : kPanelSpan;
    for (int v = 0; v < kVectors; ++v) {
      for (int i = 0; i < kLanes; ++i) {
        if (v * kLanes + i < count) widen_row(w, row + v * kLanes + i, first, columns, lane[i]);
        else __builtin_memset(lane[i], 0, sizeof lane[i]);
      }
      for (int64_t k = 0; k < columns; k += kLanes) {
        vi m[kLanes];
        for (int i = 0; i < kLanes; ++i) m[i] = load<vi>(lane[i] + k);
        transpose(m);
        for (int i = 0; i < kLanes; ++i) store(panel[k + i] + v * kLanes, m[i]);
      }
    }
    dense_tiles(panel[0], kPanelRows, x + first, ldx, columns, !first, count, tokens, y, ldy);
  }
}

static void dense(const Weight& w, int64_t row0, int64_t row1, const float* x, int64_t ldx, int tokens, float* y,
                  int64_t ldy) {
  if (tokens <= kDenseByRow) {
    for (; tokens >= 4; tokens -= 4, x += 4 * ldx, y += 4 * ldy) dense_rows<4>(w, row0, row1, x, ldx, y, ldy);
    if (tokens == 3) dense_rows<3>(w, row0, row1, x, ldx, y, ldy);
    if (tokens == 2) dense_rows<2>(w, row0, row1, x, ldx, y, ldy);
    if (tokens == 1) dense_rows<1>(w, row0, row1, x, ldx, y, ldy);
    return;
  }
  for (int64_t row = row0; row < row1; row += kPanelRows)
    dense_panel(w, row, int(row1 - row < kPanelRows ? row1 - row : kPanelRows), x, ldx, tokens, y, ldy);
}

// y[t][i] = sum over rows r of x[t][r] w[row0 + r][i].
static void dense_turned(const Weight& w, int64_t row0, int64_t row1, const float* x, int64_t ldx, int tokens, float* y,
                         int64_t ldy) {
  constexpr int64_t kRows = 128, kSpan = 64;  // 32 divides both every group size and a span
  static_assert(kSpan % kPanelRows == 0);
  alignas(64) float values[kRows][kSpan];
  __builtin_memset(values, 0, sizeof values);
  for (int64_t column = 0; column < w.k; column += kSpan) {
    const int64_t columns = w.k - column < kSpan ? w.k - column : kSpan;
    for (int64_t row = row0; row < row1; row += kRows) {
      const int64_t rows = row1 - row < kRows ? row1 - row : kRows;
      for (int64_t r = 0; r < rows; ++r) widen_row(w, row + r, column, columns, values[r]);
      for (int64_t i = 0; i < columns; i += kPanelRows) {
        const int here = int(columns - i < kPanelRows ? columns - i : kPanelRows);
        dense_tiles(values[0] + i, kSpan, x + row - row0, ldx, rows, row == row0, here, tokens, y + column + i, ldy);
      }
    }
  }
}
