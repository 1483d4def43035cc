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

static void bound_scores(const BoundedRows& q, const uint16_t* const* ranges, int64_t pages, float* scores) {
  for (int64_t page = 0; page < pages; ++page) {
    const uint16_t* low = ranges[page];
    __builtin_prefetch(ranges[page + 1 < pages ? page + 1 : page]);
    for (int64_t r = 0; r < q.rows; ++r) {
      const int64_t row = r * q.width;
      vf total{};
      for (int64_t d = 0; d < q.width; d += kLanes) {
        const vf smallest = widen(load<vhalf>(low + d)), largest = widen(load<vhalf>(low + q.width + d));
        total += load<vf>(q.positive + row + d) * largest + load<vf>(q.negative + row + d) * smallest;
        total += load<vf>(q.slack + row + d) * larger(largest, -smallest);
      }
      scores[r * pages + page] = sum(total);
    }
  }
}
