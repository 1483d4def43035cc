// Softmax attention over an int8 cache with the processor's int8 dot products. A query row and the weights of a page
// become whole numbers of 16 bits, as two bytes that are multiplied one after the other: rounding to them is finer than to
// bf16, and their products with cached bytes are summed up exactly, in any order. A page's keys are transposed once for
// all rows of the task, four channels in a word, its values interleaved, four keys in a word; pages that lie so already
// (kCacheInt8Blocks) are multiplied where they are.

constexpr int kMostWidth = 256;
constexpr int kByteRows = 4;  // more leave no registers
constexpr int kSpan = 4 * kLanes;  // columns of one tile, and bytes of one load

// A row of a panel's factors: high bytes, then low ones.
template <int kCount>
struct Halves {
  uint8_t high[kCount], low[kCount];
};

// Keys as bytes from 0, as they lie in kCacheInt8Blocks: what has no channels or no keys does no harm, its factors are zero or
// nobody looks at it.
static void pack_key_bytes(const CachedPage& page, int64_t width, int count, uint32_t* to) {
  const int64_t words = round_up(width, kSpan) / 4;
  for (int key = 0; key < count; key += kLanes)
    for (int64_t channel = 0; channel < width; channel += kSpan) {
      const char* from = page.rows + key * width + channel;
      const int64_t here = width - channel;
      vi m[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        m[i] = (vi)(here < kSpan ? load_part(from + i * width, here) : load<vb>(from + i * width));
        m[i] ^= splat(int32_t(0x80808080));
      }
      transpose(m);
      uint32_t* block = to + (key / kBlockKeys * words + channel / 4) * kBlockKeys + key % kBlockKeys;
      for (int i = 0; i < kLanes; ++i) store(block + i * kBlockKeys, m[i]);
    }
}

// Four rows of a span, four bytes in a word, columns in the order in which interleaving leaves them: quarter j of 16 vectors'
// lanes holds columns 4 j and after of each sixteen.
INLINE void interleave_rows(const __m512i (&row)[4], uint32_t* to) {
  const __m512i a = _mm512_unpacklo_epi8(row[0], row[1]), b = _mm512_unpackhi_epi8(row[0], row[1]);
  const __m512i c = _mm512_unpacklo_epi8(row[2], row[3]), d = _mm512_unpackhi_epi8(row[2], row[3]);
  _mm512_store_si512(to, _mm512_unpacklo_epi16(a, c));
  _mm512_store_si512(to + kLanes, _mm512_unpackhi_epi16(a, c));
  _mm512_store_si512(to + 2 * kLanes, _mm512_unpacklo_epi16(b, d));
  _mm512_store_si512(to + 3 * kLanes, _mm512_unpackhi_epi16(b, d));
}

// Values, to[four keys · stride + channel], the channels of a span in that order.
static void pack_value_bytes(const CachedPage& page, int64_t width, int count, uint32_t* to, int64_t stride) {
  for (int key = 0; key < count; key += 4)
    for (int64_t channel = 0; channel < width; channel += kSpan) {
      const char* from = page.rows + key * width + channel;
      const int64_t here = width - channel;
      __m512i row[4];
      for (int i = 0; i < 4; ++i) {
        row[i] = (__m512i)(here < kSpan ? load_part(from + i * width, here) : load<vb>(from + i * width));
      }
      interleave_rows(row, to + key / 4 * stride + channel);
    }
}

// A span's sums from that order into their own.
static void order_span(float* sums) {
  __m512i q[4];
  for (int i = 0; i < 4; ++i) q[i] = _mm512_load_si512(sums + i * kLanes);
  const __m512i a = _mm512_shuffle_i32x4(q[0], q[1], 0x44), b = _mm512_shuffle_i32x4(q[2], q[3], 0x44);
  const __m512i c = _mm512_shuffle_i32x4(q[0], q[1], 0xee), d = _mm512_shuffle_i32x4(q[2], q[3], 0xee);
  _mm512_store_si512(sums, _mm512_shuffle_i32x4(a, b, 0x88));
  _mm512_store_si512(sums + kLanes, _mm512_shuffle_i32x4(a, b, 0xdd));
  _mm512_store_si512(sums + 2 * kLanes, _mm512_shuffle_i32x4(c, d, 0x88));
  _mm512_store_si512(sums + 3 * kLanes, _mm512_shuffle_i32x4(c, d, 0xdd));
}

// acc[r] += the products of one half of the factors; panel and factors: bytes from 0 and signed ones, or, for values, the
// other way round. Meanwhile `ahead` is fetched, two lines at a time: more at once would wait for each other.
template <int kRows, bool kValues, bool kAhead, int kCount>
INLINE void add_half(const uint32_t* panel, int64_t stride, const uint8_t* x, int words, const char*& ahead,
                     __m512i (&acc)[kRows][4]) {
  for (int word = 0; word < words; ++word, panel += stride, x += 4) {
    if constexpr (kAhead) {
      __builtin_prefetch(ahead, 0, 2);
      __builtin_prefetch(ahead + 64, 0, 2);
      ahead += 128;
    }
    __m512i column[4];
    for (int v = 0; v < 4; ++v) column[v] = _mm512_loadu_si512(panel + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      int32_t four;
      __builtin_memcpy(&four, x + r * int64_t(sizeof(Halves<kCount>)), 4);
      const __m512i factor = _mm512_set1_epi32(four);
      for (int v = 0; v < 4; ++v)
        acc[r][v] = kValues ? _mm512_dpbusd_epi32(acc[r][v], factor, column[v])
                            : _mm512_dpbusd_epi32(acc[r][v], column[v], factor);
    }
  }
}

// kRows rows of one span. Scores: y[r] = (sum - less[r]) · scale[r]; values: y[r] += sum · scale[r].
template <int kRows, bool kValues, bool kAhead, int kCount>
INLINE void byte_tile(const uint32_t* panel, int64_t stride, const Halves<kCount>* x, int words, const int32_t* less,
                      const float* scale, const char* ahead, float* y, int64_t ldy) {
  __m512i acc[kRows][4];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < 4; ++v) acc[r][v] = _mm512_setzero_si512();
  add_half<kRows, kValues, kAhead, kCount>(panel, stride, x->high, words, ahead, acc);
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < 4; ++v) acc[r][v] = _mm512_slli_epi32(acc[r][v], 8);
  add_half<kRows, kValues, kAhead, kCount>(panel, stride, x->low, words, ahead, acc);
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < 4; ++v) {
      float* to = y + r * ldy + v * kLanes;
      if constexpr (kValues)
        store(to, load<vf>(to) + (vf)_mm512_cvtepi32_ps(acc[r][v]) * scale[r]);
      else
        store(to, (vf)_mm512_cvtepi32_ps(_mm512_sub_epi32(acc[r][v], _mm512_set1_epi32(less[r]))) * scale[r]);
    }
}

// All rows of one span. While the first are multiplied, as much as the span itself is fetched from `ahead`: once is enough.
template <int kRows, bool kValues, int kCount>
static void byte_rows(const uint32_t* panel, int64_t stride, const Halves<kCount>* x, int words, int rows,
                      const int32_t* less, const float* scale, const char* ahead, float* y, int64_t ldy) {
  for (; rows >= kRows; rows -= kRows, x += kRows, less += kRows, scale += kRows, y += kRows * ldy) {
    if (ahead) byte_tile<kRows, kValues, true, kCount>(panel, stride, x, words, less, scale, ahead, y, ldy);
    else byte_tile<kRows, kValues, false, kCount>(panel, stride, x, words, less, scale, ahead, y, ldy);
    ahead = nullptr;
  }
  if constexpr (kRows > 1)
    if (rows) byte_rows<kRows - 1, kValues, kCount>(panel, stride, x, words, rows, less, scale, ahead, y, ldy);
}

// A query row as 16-bit numbers, those as two signed bytes; returns what one of them is worth. `less` is what keys that
// are counted from 0 add to a score. What is not finite makes every score NaN.
static float split_query(const float* q, int64_t width, Halves<kMostWidth>& to, int32_t& less) {
  alignas(64) float row[kMostWidth] = {};
  __builtin_memcpy(row, q, size_t(width) * 4);
  vf largest_of{}, spoilt{};
  for (int64_t d = 0; d < width; d += kLanes) {
    const vf value = load<vf>(row + d);
    largest_of = larger(larger(value, -value), largest_of);
    spoilt += value * 0.0f;
  }
  const float size = _mm512_reduce_max_ps((__m512)largest_of), nan = sum(spoilt);
  // What is too small to tell from zero is zero.
  const float whole = size > 1e-30f ? 32512.0f / size : 0.0f;
  vi numbers{};
  for (int64_t d = 0; d < round_up(width, kSpan); d += kLanes) {
    const vi number = (vi)_mm512_cvtps_epi32((__m512)(load<vf>(row + d) * whole));
    const __m128i low = _mm512_cvtepi32_epi8((__m512i)number);
    const __m512i rest = _mm512_sub_epi32((__m512i)number, _mm512_cvtepi8_epi32(low));
    _mm_store_si128((__m128i*)(to.high + d), _mm512_cvtepi32_epi8(_mm512_srai_epi32(rest, 8)));
    _mm_store_si128((__m128i*)(to.low + d), low);
    numbers += number;
  }
  less = 128 * _mm512_reduce_add_epi32((__m512i)numbers);
  return size / 32512.0f + nan;
}

// e^x for x up to 0, to 4e-5, finer than bf16. A polynomial in the fraction of log2.
INLINE vf rough_exponential(vf x) {
  const vf power = larger(splat(-126.0f), x * 1.44269504088896341f);  // in this order a NaN stays one
  const vf whole = (vf)_mm512_roundscale_ps((__m512)power, 0), r = power - whole;
  vf p = splat(9.61813e-3f);
  p = p * r + 5.550411e-2f;
  p = p * r + 2.4022651e-1f;
  p = p * r + 6.9314718e-1f;
  p = p * r + 1.0f;
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)whole);
}

// Scores of one row to the weights of a page as two bytes each; returns what one of them is worth. The row's sums so far
// are scaled to the new maximum. The row sees keys `low` to `high` of the page: kAll if these are all.
template <bool kAll>
static float weigh_keys(const AttendTask& a, int r, int low, int high, const float* key_scale, const float* value_scale,
                        const float* scores, Halves<kKeyBlock>& weights, float* sums) {
  [[maybe_unused]] const vi lanes = (vi)_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const vf nothing = splat(-__builtin_inff());
  vf largest_of = nothing, score[kKeyBlock / kLanes];
  for (int i = 0; i < kKeyBlock / kLanes; ++i) {
    score[i] = load<vf>(scores + i * kLanes) * load<vf>(key_scale + i * kLanes);
    if constexpr (!kAll) {
      const vi key = lanes + i * kLanes;
      score[i] = (key >= low) & (key < high) ? score[i] : nothing;
    }
    largest_of = larger(score[i], largest_of);
  }
  const float here = _mm512_reduce_max_ps((__m512)largest_of), before = a.top[r];
  const float top = here > before ? here : before;
  vf total{}, most{}, weighted{};
  for (int i = 0; i < kKeyBlock / kLanes; ++i) {
    // The polynomial stops at e^-87: what lies outside the row's keys must be zero itself.
    vf weight = rough_exponential(score[i] - top);
    if constexpr (!kAll) weight = score[i] == nothing ? vf{} : weight;
    total += weight;
    weight *= load<vf>(value_scale + i * kLanes);
    if constexpr (!kAll) weight = score[i] == nothing ? vf{} : weight;  // there a scale may be anything
    weighted += weight;
    most = larger(weight, most);
    score[i] = weight;
  }
  const float largest_weight = _mm512_reduce_max_ps((__m512)most);
  const float whole = largest_weight > 1e-30f ? 65535.0f / largest_weight : 0.0f;
  for (int i = 0; i < kKeyBlock / kLanes; ++i) {
    const __m512i number = _mm512_cvtps_epi32((__m512)(score[i] * whole));
    _mm_store_si128((__m128i*)(weights.high + i * kLanes), _mm512_cvtepi32_epi8(_mm512_srli_epi32(number, 8)));
    _mm_store_si128((__m128i*)(weights.low + i * kLanes), _mm512_cvtepi32_epi8(number));
  }
  float shrink = 1.0f;
  if (top != before) {
    shrink = before == -__builtin_inff() ? 0.0f : exponential(splat(before - top))[0];
    for (int64_t d = 0; d < round_up(a.head_dim, kSpan); d += kLanes) store(sums + d, load<vf>(sums + d) * shrink);
  }
  a.total[r] = a.total[r] * shrink + sum(total);
  a.top[r] = top;
  return largest_weight / 65535.0f + sum(weighted) * 0.0f;  // a weight that is NaN makes the row so
}

static float weigh_bytes(const AttendTask& a, int r, int64_t first, int count, const float* key_scale,
                         const float* value_scale, const float* scores, Halves<kKeyBlock>& weights, float* sums) {
  const int64_t from = a.from[r] - first, to = a.to[r] - first;
  const int low = int(from < 0 ? 0 : from < count ? from : count), high = int(to < 0 ? 0 : to < count ? to : count);
  if (low >= high) {
    __builtin_memset(&weights, 0, sizeof weights);
    return 0.0f;
  }
  if (low == 0 && high == kKeyBlock)
    return weigh_keys<true>(a, r, low, high, key_scale, value_scale, scores, weights, sums);
  return weigh_keys<false>(a, r, low, high, key_scale, value_scale, scores, weights, sums);
}

static void attend_bytes(const AttendTask& a) {
  const int64_t width = a.head_dim, padded = round_up(width, kSpan);
  alignas(64) float scores[kAttendRows][kKeyBlock], sums[kAttendRows][kMostWidth];
  alignas(64) uint32_t panel[kMostWidth / 4 * kKeyBlock];
  alignas(64) Halves<kMostWidth> q[kAttendRows];
  alignas(64) Halves<kKeyBlock> weights[kAttendRows];
  alignas(64) float query_scale[kAttendRows], weight_scale[kAttendRows];
  int32_t less[kAttendRows];
  const bool blocks = a.pool->storage == kCacheInt8Blocks;
  for (int r = 0; r < a.rows; ++r) {
    a.top[r] = -__builtin_inff();
    a.total[r] = 0.0f;
    query_scale[r] = split_query(a.q + r * width, width, q[r], less[r]);
    __builtin_memset(sums[r], 0, size_t(padded) * 4);
  }
  for (int64_t block = a.first / kKeyBlock; block * kKeyBlock < a.last; ++block) {
    const int64_t first = block * kKeyBlock;
    const int count = int(a.last - first < kKeyBlock ? a.last - first : kKeyBlock);
    const CachedPage its_keys = cached_page(a, false, block), its_values = cached_page(a, true, block);
    const uint32_t* from = blocks ? reinterpret_cast<const uint32_t*>(its_keys.rows) : panel;
    if (!blocks) pack_key_bytes(its_keys, width, count, panel);
    for (int key = 0; key < count; key += kBlockKeys)
      byte_rows<kByteRows, false>(from + key * (padded / 4), kBlockKeys, q, int(padded / 4), a.rows, less, query_scale,
                                  its_keys.next + key * width, scores[0] + key, kKeyBlock);
    for (int r = 0; r < a.rows; ++r)
      weight_scale[r] =
          weigh_bytes(a, r, first, count, its_keys.scale, its_values.scale, scores[r], weights[r], sums[r]);
    from = blocks ? reinterpret_cast<const uint32_t*>(its_values.rows) : panel;
    if (!blocks) pack_value_bytes(its_values, width, count, panel, padded);
    for (int64_t channel = 0; channel < width; channel += kSpan)
      byte_rows<kByteRows, true>(from + channel, padded, weights, (count + 3) / 4, a.rows, less, weight_scale,
                                 its_values.next + channel * kKeyBlock, sums[0] + channel, kMostWidth);
  }
  for (int r = 0; r < a.rows; ++r) {
    for (int64_t channel = 0; channel < width && !blocks; channel += kSpan) order_span(sums[r] + channel);
    __builtin_memcpy(a.out + r * width, sums[r], size_t(width) * 4);
  }
}

static void attend_plain_or_bytes(const AttendTask& a) {
  if (a.compressed()) return attend_compressed(a);
  const bool blocks = a.pool->storage == kCacheInt8Blocks && a.head_dim % kSpan == 0;
  if (a.exact || (a.pool->storage != kCacheInt8 && !blocks)) attend(a);
  else attend_bytes(a);
}
