// Many tokens against one panel of rows: unpack and transpose the panel once, then tiles of tokens x rows in
// registers.
//
// Panel: for every 4-byte word along K, one vector of each lane's row (int8), or its low and its high nibbles
// (2 to 4 bits); a lane is an out feature, so nothing is summed across lanes. After it, f32 scales [G, kPanelRows].

constexpr int kPanelRows = kVectors * kLanes;

template <int kBits>
static void unpack_panel(const Weight& w, int64_t row0, int count, uint8_t* panel, float* scales) {
  const int64_t words = kBits == 8 ? w.k / 4 : w.k / 8, groups = w.groups();
  const int64_t stride = w.stride(), scale_stride = w.scale_stride();
  constexpr int kParts = kBits == 8 ? 1 : 2;
  for (int v = 0; v < kVectors; ++v)
    for (int64_t word = 0; word < words; word += kLanes) {
      const int here = int(words - word < kLanes ? words - word : kLanes);
      vi m[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const int row = v * kLanes + i;
        const uint8_t* from = w.packed + (row0 + row) * stride + packed_bytes<kBits>(word * 4);
        m[i] = row >= count      ? vi{}
               : here == kLanes ? (vi)as_stored<kBits>(from, kBytes)
                                : (vi)as_stored<kBits>(from, here * 4);
      }
      transpose(m);
      for (int i = 0; i < here; ++i) {
        uint8_t* to = panel + ((word + i) * kParts * kVectors + v) * kBytes;
        if constexpr (kBits == 8) {
          store(to, m[i]);
        } else {
          store(to, low_nibbles((vb)m[i]));
          store(to + kVectors * kBytes, high_nibbles((vb)m[i]));
        }
      }
    }
  for (int row = 0; row < kPanelRows; ++row)
    for (int64_t g = 0; g < groups; ++g)
      scales[g * kPanelRows + row] = row < count ? bf16_to_float(w.scale[(row0 + row) * scale_stride + g]) : 0.0f;
}

// kBits is 8 or 4, whatever the panel was unpacked from; `offset` is what stored values are above their own.
template <int kBits, int kTokens>
static void tile(const Weight& w, int offset, const uint8_t* panel, const float* scales, const Activations& a, int count,
                 float* y, int64_t ldy) {
  const int64_t groups = w.groups();
  constexpr int kSpan = kBytes * 8 / kBits;
  const int spans = w.group < kSpan ? kSpan / w.group : 1;  // groups in one vector of packed bytes
  RunSums<kTokens * kVectors> sums;
  vf acc[kTokens * kVectors] = {};
  for (int64_t g = 0; g < groups; ++g) {
    vi dot[kTokens][kVectors];
    for (int t = 0; t < kTokens; ++t)
      for (int v = 0; v < kVectors; ++v) dot[t][v] = splat(-offset * a.sum[t * a.g_stride + g]);
    for (int part = 0; part < w.group; part += 128) {
      const int64_t first = g * w.group + part;
      const int steps = (w.group < 128 ? w.group : 128) * kBits / 32;
      const int8_t* q = a.q + (kBits == 4 ? first / 128 * 128 + first % 128 / 2 : first);
      for (int step = 0; step < steps; ++step, q += 4) {
        vb low[kVectors];
        for (int v = 0; v < kVectors; ++v) low[v] = load<vb>(panel + v * kBytes);
        panel += kVectors * kBytes;
        for (int t = 0; t < kTokens; ++t) {
          vb x = splat_word(q + t * a.q_stride);
          for (int v = 0; v < kVectors; ++v)
            dot[t][v] = kBits == 4 ? dot4(dot[t][v], low[v], x) : dot8(dot[t][v], low[v], x);
        }
        if constexpr (kBits == 4) {
          vb high[kVectors];
          for (int v = 0; v < kVectors; ++v) high[v] = load<vb>(panel + v * kBytes);
          panel += kVectors * kBytes;
          for (int t = 0; t < kTokens; ++t) {
            vb x = splat_word(q + 64 + t * a.q_stride);
            for (int v = 0; v < kVectors; ++v) dot[t][v] = dot4(dot[t][v], high[v], x);
          }
        }
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      const vf ws = load<vf>(scales + g * kPanelRows + v * kLanes);
      for (int t = 0; t < kTokens; ++t)
        acc[t * kVectors + v] += to_float(dot[t][v]) * (ws * splat(a.scale[t * a.g_stride + g]));
    }
    if ((g + 1) % spans == 0 || g + 1 == groups) {
      sums.add(acc);
      for (vf& value : acc) value = vf{};
    }
  }
  sums.finish();
  for (int t = 0; t < kTokens; ++t) {
    const vf* of_token = sums.total + t * kVectors;
    if (count == kPanelRows) {
      for (int v = 0; v < kVectors; ++v) store(y + t * ldy + v * kLanes, of_token[v]);
    } else {
      float row[kPanelRows];
      for (int v = 0; v < kVectors; ++v) store(row + v * kLanes, of_token[v]);
      for (int i = 0; i < count; ++i) y[t * ldy + i] = row[i];
    }
  }
}

template <int kBits, int kTokens>
INLINE void last_tile(const Weight& w, int offset, const uint8_t* panel, const float* scales, const Activations& a, int count,
                      int tokens, float* y, int64_t ldy) {
  if constexpr (kTokens > 0) {
    if (tokens == kTokens) tile<kBits, kTokens>(w, offset, panel, scales, a, count, y, ldy);
    else last_tile<kBits, kTokens - 1>(w, offset, panel, scales, a, count, tokens, y, ldy);
  }
}

template <int kBits>
static void gemm_panel(const Weight& w, int64_t row0, int count, Activations a, int tokens, float* y, int64_t ldy,
                       uint8_t* panel) {
  constexpr int kWide = kBits == 8 ? 8 : 4, kOffset = Form<kBits, 128>::kOffset;
  float* scales = reinterpret_cast<float*>(panel + round_up(w.k * kPanelRows, 64));
  unpack_panel<kBits>(w, row0, count, panel, scales);
  y += row0;
  for (; tokens >= kTileTokens; tokens -= kTileTokens, y += kTileTokens * ldy) {
    tile<kWide, kTileTokens>(w, kOffset, panel, scales, a, count, y, ldy);
    a.q += kTileTokens * a.q_stride;
    a.scale += kTileTokens * a.g_stride;
    a.sum += kTileTokens * a.g_stride;
  }
  last_tile<kWide, kTileTokens - 1>(w, kOffset, panel, scales, a, count, tokens, y, ldy);
}

static void gemm(const Weight& w, int64_t row0, int64_t row1, const Activations& a, int tokens, float* y,
                 int64_t ldy, uint8_t* panel) {
  for (int64_t row = row0; row < row1; row += kPanelRows) {
    const int count = int(row1 - row < kPanelRows ? row1 - row : kPanelRows);
    if (w.kind == kInt4) gemm_panel<4>(w, row, count, a, tokens, y, ldy, panel);
    else if (w.kind == kInt3) gemm_panel<3>(w, row, count, a, tokens, y, ldy, panel);
    else if (w.kind == kInt2) gemm_panel<2>(w, row, count, a, tokens, y, ldy, panel);
    else gemm_panel<8>(w, row, count, a, tokens, y, ldy, panel);
  }
}
