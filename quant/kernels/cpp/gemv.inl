// Rows of a packed weight against a few tokens: every weight byte is read once, in the order it lies.
//
// A vector of packed bytes holds whole groups or lies within one. Its integer dot products are scaled lane by
// lane; the offset of the stored values (q + 8, q + 128) is taken out at the end of the row through `fix`.

constexpr int64_t kAhead = 8192;  // bytes of prefetch distance: measured best from 1 to 16 KiB

// Scales of the kGroups groups in one vector, each in the lanes that hold its products.
template <int kGroups>
INLINE vf weight_scales(const uint16_t* scale, vi lanes) {
  if (kGroups == 1) return splat(bf16_to_float(*scale));
  uint64_t four = 0;
  __builtin_memcpy(&four, scale, size_t(2 * kGroups));
  return pick_bf16(four, lanes);
}

template <int kGroups>
INLINE vf token_scales(const float* scale, vi lanes) {
  return kGroups == 1 ? splat(*scale) : pick_float(scale, lanes);
}

template <int kBits>
INLINE vi dot_vector(vb weight, const int8_t* q, int64_t byte) {
  if constexpr (kBits == 4) {
    q += byte / 64 * 128 + byte % 64;
    vb high = (vb)((vu)weight >> 4);
    return dot4(dot4(vi{}, weight & 0x0f, load<vb>(q)), high & 0x0f, load<vb>(q + 64));
  } else {
    return dot8(vi{}, weight, load<vb>(q + byte));
  }
}

template <int kBits, int kGroups, int kTokens>
static void gemv_rows(const Weight& w, int64_t row0, int64_t row1, const Activations& a, float* y, int64_t ldy) {
  constexpr int kPerByte = 8 / kBits;
  const int64_t bytes = w.row_bytes(), groups = w.groups(), full = bytes / kBytes * kBytes;
  const int64_t group_bytes = w.group / kPerByte;
  const int64_t stride = w.stride(), scale_stride = w.scale_stride();
  const int shift = __builtin_ctzll(uint64_t(group_bytes));
  vi lanes{};
  for (int i = 0; i < kLanes; ++i) lanes[i] = int32_t(i * 4 / group_bytes);
  for (int64_t row = row0; row < row1; ++row) {
    const uint8_t* from = w.packed + row * stride;
    const uint16_t* scale = w.scale + row * scale_stride;
    vf acc[kTokens] = {};
    auto step = [&](vb weight, const uint16_t* its_scale, int64_t byte) __attribute__((always_inline)) {
      const int64_t g = byte >> shift;
      const vf ws = weight_scales<kGroups>(its_scale, lanes);
      for (int t = 0; t < kTokens; ++t) {
        vi dot = dot_vector<kBits>(weight, a.q + t * a.q_stride, byte);
        acc[t] += to_float(dot) * (ws * token_scales<kGroups>(a.scale + t * a.g_stride + g, lanes));
      }
    };
    for (int64_t byte = 0; byte < full; byte += kBytes) {
      if (kBytes == 64 || byte % 64 == 0) __builtin_prefetch(from + byte + kAhead);
      step(load<vb>(from + byte), scale + (byte >> shift), byte);
    }
    if (full < bytes) {
      const int64_t g = full >> shift;
      uint8_t rest[kBytes] = {};
      uint16_t rest_scale[4] = {};
      __builtin_memcpy(rest, from + full, size_t(bytes - full));
      for (int64_t i = g; i < groups; ++i) rest_scale[i - g] = scale[i];
      step(load<vb>(rest), rest_scale, full);
    }
    for (int t = 0; t < kTokens; ++t) {
      float extra = 0;
      if (kBits == 4 || kOffset8) {
        const float* fix = a.fix + t * a.g_stride;
        int64_t g = 0;
        for (; g + kLanes <= groups; g += kLanes) acc[t] -= widen(load<vhalf>(scale + g)) * load<vf>(fix + g);
        for (; g < groups; ++g) extra += bf16_to_float(scale[g]) * fix[g];
      }
      y[t * ldy + row] = sum(acc[t]) - extra;
    }
  }
}

template <int kBits, int kGroups>
static void gemv_tokens(const Weight& w, int64_t row0, int64_t row1, const Activations& a, int tokens, float* y,
                        int64_t ldy) {
  switch (tokens) {
    case 1: return gemv_rows<kBits, kGroups, 1>(w, row0, row1, a, y, ldy);
    case 2: return gemv_rows<kBits, kGroups, 2>(w, row0, row1, a, y, ldy);
    case 3: return gemv_rows<kBits, kGroups, 3>(w, row0, row1, a, y, ldy);
    default: return gemv_rows<kBits, kGroups, 4>(w, row0, row1, a, y, ldy);
  }
}

static void gemv(const Weight& w, int64_t row0, int64_t row1, const Activations& a, int tokens, float* y,
                 int64_t ldy) {
  if (w.kind == kInt4) {
    const int spans = 2 * kBytes / w.group;  // groups in one vector
    if constexpr (kBytes >= 64)
      if (spans == 4) return gemv_tokens<4, 4>(w, row0, row1, a, tokens, y, ldy);
    if constexpr (kBytes >= 32)
      if (spans == 2) return gemv_tokens<4, 2>(w, row0, row1, a, tokens, y, ldy);
    return gemv_tokens<4, 1>(w, row0, row1, a, tokens, y, ldy);
  }
  if constexpr (kBytes >= 64)
    if (w.group == 32) return gemv_tokens<8, 2>(w, row0, row1, a, tokens, y, ldy);
  gemv_tokens<8, 1>(w, row0, row1, a, tokens, y, ldy);
}
