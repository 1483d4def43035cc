// Attention over compressed keys and values with the processor's bf16 dot products. A latent is its own value and all heads
// look at it, so nothing is packed: scores are sums along the channels as they lie, some rows by some keys at a time, and
// values are interleaved in registers. Each sum has one order, whatever rows and keys are beside it.

constexpr int kTileKeys = 4, kScoreRows = 4, kSumRows = 8;

// One page's keys in bf16: the first `half` channels of key i at low + i * stride bytes, the others at high + i * stride.
struct Latents {
  const char *low, *high;
  int64_t half, stride;

  const char* at(int64_t channel) const { return channel < half ? low + channel * 2 : high + (channel - half) * 2; }
};

// The sums of four vectors.
INLINE __m128 sum_four(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// scores[r][key] of kTileKeys keys.
template <int kRows>
static void score_latents(const Latents& keys, int64_t key, const uint16_t (*q)[kMostWide], int rows,
                          float (*scores)[kKeyBlock]) {
  static_assert(kTileKeys == 4);
  for (; rows >= kRows; rows -= kRows, q += kRows, scores += kRows) {
    __m512 acc[kRows][kTileKeys];
    for (int r = 0; r < kRows; ++r)
      for (int i = 0; i < kTileKeys; ++i) acc[r][i] = _mm512_setzero_ps();
    for (int64_t channel = 0; channel < 2 * keys.half; channel += 2 * kLanes) {
      const char* from = keys.at(channel) + key * keys.stride;
      bh column[kTileKeys];
      for (int i = 0; i < kTileKeys; ++i) column[i] = (bh)_mm512_loadu_si512(from + i * keys.stride);
      for (int r = 0; r < kRows; ++r) {
        const bh factor = (bh)_mm512_load_si512(q[r] + channel);
        for (int i = 0; i < kTileKeys; ++i) acc[r][i] = _mm512_dpbf16_ps(acc[r][i], factor, column[i]);
      }
    }
    for (int r = 0; r < kRows; ++r)
      _mm_store_ps(scores[r] + key, sum_four(acc[r][0], acc[r][1], acc[r][2], acc[r][3]));
  }
  if constexpr (kRows > 1)
    if (rows) score_latents<kRows - 1>(keys, key, q, rows, scores);
}

// out[r] += weights[r] · the first `width` channels of the first `count` keys.
template <int kRows>
static void add_latents(const Latents& keys, int count, const uint16_t (*weights)[kKeyBlock], int rows, int64_t width,
                        float* out) {
  uint16_t order[2 * kLanes];  // one of the first key, one of the second
  for (int i = 0; i < 2 * kLanes; ++i) order[i] = uint16_t(i / 2 + i % 2 * 2 * kLanes);
  const __m512i low = _mm512_loadu_si512(order), high = _mm512_add_epi16(low, _mm512_set1_epi16(kLanes));
  for (; rows >= kRows; rows -= kRows, weights += kRows, out += kRows * width)
    for (int64_t channel = 0; channel < width; channel += 2 * kLanes) {
      const char* from = keys.at(channel);
      __m512 acc[kRows][2];
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < 2; ++v) acc[r][v] = _mm512_loadu_ps(out + r * width + channel + v * kLanes);
      for (int key = 0; key < count; key += 2, from += 2 * keys.stride) {
        const __m512i a = _mm512_loadu_si512(from);
        const __m512i b = key + 1 < count ? _mm512_loadu_si512(from + keys.stride) : _mm512_setzero_si512();
        const bh first = (bh)_mm512_permutex2var_epi16(a, low, b), second = (bh)_mm512_permutex2var_epi16(a, high, b);
        for (int r = 0; r < kRows; ++r) {
          const bh weight = splat_pair(weights[r] + key);
          acc[r][0] = _mm512_dpbf16_ps(acc[r][0], weight, first);
          acc[r][1] = _mm512_dpbf16_ps(acc[r][1], weight, second);
        }
      }
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < 2; ++v) _mm512_storeu_ps(out + r * width + channel + v * kLanes, acc[r][v]);
    }
  if constexpr (kRows > 1)
    if (rows) add_latents<kRows - 1>(keys, count, weights, rows, width, out);
}

// An int8 row as bf16.
static void widen_bytes(const CachedPage& page, int64_t row, int64_t width, uint16_t* to) {
  const float scale = page.scale[row];
  for (int64_t i = 0; i < width; i += 2 * kLanes) {
    vf part[2];
    for (int v = 0; v < 2; ++v) {
      const __m128i bytes = _mm_loadu_si128((const __m128i*)(page.rows + row * width + i + v * kLanes));
      part[v] = (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)) * scale;
    }
    store(to + i, to_bf16(part[0], part[1]));
  }
}

static void attend_latents(const AttendTask& a) {
  const int64_t half = a.head_dim, width = a.key_width, size = a.pool->storage == kCacheBf16 ? 2 : 1;
  const bool stored = a.pool->storage == kCacheBf16 || a.pool->storage == kCacheInt8;
  if (a.exact || !stored || half % (2 * kLanes) || a.value_width % (2 * kLanes)) return attend_compressed(a);
  alignas(64) float scores[kAttendRows][kKeyBlock];
  alignas(64) uint16_t q[kAttendRows][kMostWide], weights[kAttendRows][kKeyBlock], widened[kKeyBlock][kMostWide];
  for (int r = 0; r < a.rows; ++r) {
    a.top[r] = -__builtin_inff();
    a.total[r] = 0.0f;
    for (int64_t d = 0; d < width; d += 2 * kLanes) {
      const float* from = a.q + r * width + d;
      store(q[r] + d, to_bf16(load<vf>(from), load<vf>(from + kLanes)));
    }
  }
  __builtin_memset(a.out, 0, size_t(a.rows * a.value_width) * 4);
  for (int64_t block = a.first / kKeyBlock; block * kKeyBlock < a.last; ++block) {
    const int64_t first = block * kKeyBlock;
    const int count = int(a.last - first < kKeyBlock ? a.last - first : kKeyBlock);
    const CachedPage low = cached_page(a, false, block), high = cached_page(a, true, block);
    Latents keys{low.rows, high.rows, half, half * 2};
    if (size == 1) keys = {(const char*)widened[0], (const char*)(widened[0] + half), half, kMostWide * 2};
    // The last tile may take in rows of the page that no key has yet: nobody looks at what their scores are.
    for (int key = 0; key < count; key += kTileKeys) {
      for (int64_t byte = 0; byte < kTileKeys * half * size; byte += 64) {
        __builtin_prefetch(low.next + key * half * size + byte, 0, 2);
        __builtin_prefetch(high.next + key * half * size + byte, 0, 2);
      }
      for (int i = key; size == 1 && i < key + kTileKeys; ++i) {
        widen_bytes(low, i, half, widened[i]);
        widen_bytes(high, i, half, widened[i] + half);
      }
      score_latents<kScoreRows>(keys, key, q, a.rows, scores);
    }
    for (int r = 0; r < a.rows; ++r) weigh_pairs(a, r, first, count, scores[r], weights[r]);
    add_latents<kSumRows>(keys, count, weights, a.rows, a.value_width, a.out);
  }
}
