// The same over compressed keys and values: a key is a row of the keys' page and one of the values' page after it, and the
// first value_width channels of it are its value. All heads look at one such key, so it is widened once for all of them.

constexpr int64_t kMostWide = 640;  // channels of a key

static void attend_compressed(const AttendTask& a) {
  alignas(64) float scores[kAttendRows][kKeyBlock];
  alignas(64) float panel[kMostWide][kPanelRows];
  alignas(64) float keys[kKeyBlock][kMostWide];
  const int64_t half = a.head_dim, width = a.key_width, padded = round_up(width, kLanes);
  for (int r = 0; r < a.rows; ++r) {
    a.top[r] = -__builtin_inff();
    a.total[r] = 0.0f;
  }
  __builtin_memset(a.out, 0, size_t(a.rows * a.value_width) * 4);
  for (int64_t block = a.first / kKeyBlock; block * kKeyBlock < a.last; ++block) {
    const int64_t first = block * kKeyBlock;
    const int count = int(a.last - first < kKeyBlock ? a.last - first : kKeyBlock);
    const int filled = int(round_up(count, kPanelRows));
    const CachedPage low = cached_page(a, false, block), high = cached_page(a, true, block);
    for (int key = 0; key < filled; ++key) {
      const bool is_there = key < count;
      if (is_there) {
        widen_cached(low, key, half, keys[key]);
        widen_cached(high, key, half, keys[key] + half);
      }
      const int64_t from = is_there ? width : 0;
      __builtin_memset(keys[key] + from, 0, size_t(kMostWide - from) * 4);
    }
    for (int start = 0; start < count; start += kPanelRows) {
      for (int v = 0; v < kVectors; ++v)
        for (int64_t d = 0; d < padded; d += kLanes) {
          vi m[kLanes];
          for (int i = 0; i < kLanes; ++i) m[i] = load<vi>(keys[start + v * kLanes + i] + d);
          transpose(m);
          for (int i = 0; i < kLanes; ++i) store(panel[d + i] + v * kLanes, m[i]);
        }
      const int here = count - start < kPanelRows ? count - start : kPanelRows;
      dense_tiles(panel[0], kPanelRows, a.q, width, width, true, here, a.rows, scores[0] + start, kKeyBlock);
    }
    for (int r = 0; r < a.rows; ++r) weigh_row(a, r, first, count, scores[r]);
    for (int64_t d = 0; d < a.value_width; d += kPanelRows) {
      const int here = int(a.value_width - d < kPanelRows ? a.value_width - d : kPanelRows);
      dense_tiles(keys[0] + d, kMostWide, scores[0], kKeyBlock, count, false, here, a.rows, a.out + d, a.value_width);
    }
  }
}
