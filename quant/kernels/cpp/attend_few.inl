// Softmax attention of the few query rows of a decode step, which reads keys and values once and packs none of them: what
// is turned for the products stays in registers. Every sum is made in the order of attend_bf16.inl, to the bit.

constexpr int kFewRows = 8;

// scores[r][key] of the first `count` keys of a page, 16 at a time.
template <int kRows>
static void score_few(const CachedPage& page, int64_t width, int count, const uint16_t (*q)[2 * kMostPairs],
                      float (*scores)[kKeyBlock]) {
  const int64_t row_bytes = width * 2;
  for (int key = 0; key < count; key += kLanes) {
    __m512 acc[kRows];
    for (int r = 0; r < kRows; ++r) acc[r] = _mm512_setzero_ps();
    for (int64_t channel = 0; channel < width; channel += 2 * kLanes) {
      vi m[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const int64_t place = (key + i) * row_bytes + channel * 2;
        __builtin_prefetch(page.next + place, 0, 2);
        m[i] = key + i < count ? load<vi>(page.rows + place) : vi{};
      }
      transpose(m);
      for (int i = 0; i < kLanes; ++i)
        for (int r = 0; r < kRows; ++r) acc[r] = _mm512_dpbf16_ps(acc[r], splat_pair(q[r] + channel + 2 * i), (bh)m[i]);
    }
    for (int r = 0; r < kRows; ++r) _mm512_storeu_ps(scores[r] + key, acc[r]);
  }
}

// 16 channels of two rows as pairs, (first row, second row).
INLINE bh pair_rows(const char* a, const char* b) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)a));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)b));
  return (bh)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// out[r] += weights[r] · values of the first `count` keys of a page, 32 channels at a time.
template <int kRows>
static void add_few(const CachedPage& page, int64_t width, int count, const uint16_t (*weights)[kKeyBlock], float* out) {
  const int64_t row_bytes = width * 2;
  alignas(64) static const char zeros[64] = {};
  for (int64_t channel = 0; channel < width; channel += 2 * kLanes) {
    __m512 acc[kRows][2];
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < 2; ++v) acc[r][v] = _mm512_loadu_ps(out + r * width + channel + v * kLanes);
    for (int key = 0; key < count; key += 2) {
      const char* a = page.rows + key * row_bytes + channel * 2;
      const char* b = key + 1 < count ? a + row_bytes : zeros;
      __builtin_prefetch(page.next + key * row_bytes + channel * 2, 0, 2);
      __builtin_prefetch(page.next + (key + 1) * row_bytes + channel * 2, 0, 2);
      const bh first = pair_rows(a, b), second = pair_rows(a + 2 * kLanes, b + 2 * kLanes);
      for (int r = 0; r < kRows; ++r) {
        const bh weight = splat_pair(weights[r] + key);
        acc[r][0] = _mm512_dpbf16_ps(acc[r][0], weight, first);
        acc[r][1] = _mm512_dpbf16_ps(acc[r][1], weight, second);
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < 2; ++v) _mm512_storeu_ps(out + r * width + channel + v * kLanes, acc[r][v]);
  }
}

template <int kRows>
static void attend_few(const AttendTask& a, const uint16_t (*q)[2 * kMostPairs]) {
  if constexpr (kRows > 1)
    if (a.rows < kRows) return attend_few<kRows - 1>(a, q);
  alignas(64) float scores[kRows][kKeyBlock];
  alignas(64) uint16_t weights[kRows][kKeyBlock];
  for (int64_t block = a.first / kKeyBlock; block * kKeyBlock < a.last; ++block) {
    const int64_t first = block * kKeyBlock;
    const int count = int(a.last - first < kKeyBlock ? a.last - first : kKeyBlock);
    const CachedPage its_keys = cached_page(a, false, block), its_values = cached_page(a, true, block);
    score_few<kRows>(its_keys, a.head_dim, count, q, scores);
    for (int r = 0; r < kRows; ++r)
      weigh_pairs(a, r, first, count, scores[r], weights[r]);
    add_few<kRows>(its_values, a.head_dim, count, weights, a.out);
  }
}
