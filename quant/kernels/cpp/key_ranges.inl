// What the keys of a page can be, and the greatest score of a query among them: for every channel the larger of its
// products with the smallest and the largest key, summed up (Quest, arXiv 2406.10774, ranks pages by that; here it has to
// hold).

// The nearest bf16 that is not larger, or not smaller.
INLINE uint16_t outward(float value, bool up) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  const bool away = (value > 0) == up && (bits & 0xffff);
  return uint16_t((bits >> 16) + away);
}

static void find_ranges(const KvPool& pool, int64_t head, int64_t head_dim, uint16_t* ranges) {
  const int64_t size = pool.storage == kCacheF32 ? 4 : pool.storage == kCacheBf16 ? 2 : 1;
  const int64_t width = range_width(head_dim);
  alignas(64) float row[256] = {}, low[256], high[256];
  vf spoilt{};
  for (int64_t d = 0; d < width; d += kLanes) {
    store(low + d, splat(__builtin_inff()));
    store(high + d, splat(-__builtin_inff()));
  }
  for (int of_values = 0; of_values < 2; ++of_values) {
    const char* base = static_cast<const char*>(of_values ? pool.values : pool.keys);
    const char* rows = base + head * kPageTokens * head_dim * size;
    const float* scales = of_values ? pool.value_scale : pool.key_scale;
    const CachedPage page{rows, rows, scales ? scales + head * kPageTokens : nullptr, pool.storage, of_values != 0};
    for (int key = 0; key < kPageTokens; ++key) {
      widen_cached(page, key, head_dim, row);
      for (int64_t d = 0; d < width; d += kLanes) {
        const vf value = load<vf>(row + d);
        spoilt += value * 0.0f;
        if (of_values) continue;
        store(low + d, smaller(value, load<vf>(low + d)));
        store(high + d, larger(value, load<vf>(high + d)));
      }
    }
  }
  const bool finite = sum(spoilt) == 0.0f;
  for (int64_t d = 0; d < width; ++d) {
    ranges[d] = outward(finite || d >= head_dim ? low[d] : -__builtin_inff(), false);
    ranges[width + d] = outward(finite || d >= head_dim ? high[d] : __builtin_inff(), true);
  }
}

// Of up to kRows rows, for which a page's ranges are read once. A row's sum is the same whatever is beside it.
template <int kRows>
static void bound_some(const BoundedRows& q, int64_t first, const uint16_t* const* ranges, int64_t pages, float* scores) {
  if constexpr (kRows > 1)
    if (q.rows - first < kRows) return bound_some<kRows - 1>(q, first, ranges, pages, scores);
  for (int64_t page = 0; page < pages; ++page) {
    const uint16_t *low = ranges[page], *next = ranges[page + 1 < pages ? page + 1 : page];
    vf total[kRows] = {};
    for (int64_t d = 0; d < q.width; d += kLanes) {
      __builtin_prefetch(next + d);
      __builtin_prefetch(next + q.width + d);
      const vf smallest = widen(load<vhalf>(low + d)), largest = widen(load<vhalf>(low + q.width + d));
      const vf size = larger(largest, -smallest);
      for (int r = 0; r < kRows; ++r) {
        const int64_t at = (first + r) * q.width + d;
        total[r] += load<vf>(q.positive + at) * largest + load<vf>(q.negative + at) * smallest;
        total[r] += load<vf>(q.slack + at) * size;
      }
    }
    for (int r = 0; r < kRows; ++r) scores[(first + r) * pages + page] = sum(total[r]);
  }
}

static void bound_scores(const BoundedRows& q, const uint16_t* const* ranges, int64_t pages, float* scores) {
  constexpr int kAtOnce = 5;
  for (int64_t first = 0; first < q.rows; first += kAtOnce) bound_some<kAtOnce>(q, first, ranges, pages, scores);
}
