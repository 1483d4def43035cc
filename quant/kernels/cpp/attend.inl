// Softmax attention of a few query rows over a run of cached keys, in blocks: scores, running maximum, weighted
// values (the online softmax). Both products are the dense tile: keys transposed so that a lane is a key, values
// as they lie so that a lane is a channel.

constexpr int kKeyBlock = kPageTokens;

// One head's keys or values of one page. `next` is the page after it, or the same again.
struct CachedPage {
  const char *rows, *next;
  const float* scale;
  int32_t storage;
  bool values;
};

static CachedPage cached_page(const AttendTask& a, bool values, int64_t block) {
  const KvPool& pool = *a.pool;
  const int64_t size = pool.storage == kCacheF32 ? 4 : pool.storage == kCacheBf16 ? 2 : 1;
  const int64_t next = (block + 1) * kPageTokens < a.ahead ? block + 1 : block;
  const char* base = static_cast<const char*>(values ? pool.values : pool.keys);
  auto head = [&](int64_t which) { return (int64_t(a.pages[which]) * a.kv_heads + a.kv_head) * kPageTokens; };
  const float* scales = values ? pool.value_scale : pool.key_scale;
  return {base + head(block) * a.head_dim * size, base + head(next) * a.head_dim * size,
          scales ? scales + head(block) : nullptr, pool.storage, values};
}

static void widen_cached(const CachedPage& page, int64_t row, int64_t width, float* to) {
  const int64_t size = page.storage == kCacheF32 ? 4 : page.storage == kCacheBf16 ? 2 : 1;
  for (int64_t byte = 0; byte < width * size; byte += 64) __builtin_prefetch(page.next + row * width * size + byte);
  if (page.storage == kCacheF32) {
    __builtin_memcpy(to, page.rows + row * width * 4, size_t(width) * 4);
  } else if (page.storage == kCacheBf16) {
    widen_run(page.rows, kSourceBf16, row * width, int(width), to);
  } else if (page.storage == kCacheInt8Blocks) {
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(page.rows);
    const float scale = page.scale[row];
    for (int64_t i = 0; i < width; ++i)
      to[i] = float(page.values ? int8_t(bytes[value_place(row, i, width)]) : bytes[key_place(row, i, width)] - 128) * scale;
  } else {
    const int8_t* bytes = reinterpret_cast<const int8_t*>(page.rows) + row * width;
    const float scale = page.scale[row];
    for (int64_t i = 0; i < width; ++i) to[i] = float(bytes[i]) * scale;
  }
}

// scores[r][key] for the first `count` keys of a page.
static void score_block(const AttendTask& a, const CachedPage& page, int count, float* scores,
                        float (*panel)[kPanelRows]) {
  const int64_t width = a.head_dim, padded = round_up(width, kLanes);
  alignas(64) float rows[kLanes][256];
  for (int start = 0; start < count; start += kPanelRows) {
    for (int v = 0; v < kVectors; ++v) {
      for (int i = 0; i < kLanes; ++i) {
        const int key = start + v * kLanes + i;
        if (key < count) widen_cached(page, key, width, rows[i]);
        else __builtin_memset(rows[i], 0, size_t(width) * 4);
        for (int64_t d = width; d < padded; ++d) rows[i][d] = 0.0f;
      }
      for (int64_t d = 0; d < width; d += kLanes) {
        vi m[kLanes];
        for (int i = 0; i < kLanes; ++i) m[i] = load<vi>(rows[i] + d);
        transpose(m);
        for (int i = 0; i < kLanes; ++i) store(panel[d + i] + v * kLanes, m[i]);
      }
    }
    const int here = count - start < kPanelRows ? count - start : kPanelRows;
    dense_tiles(panel[0], kPanelRows, a.q, width, width, true, here, a.rows, scores + start, kKeyBlock);
  }
}

// Scores of one row to weights; the row's output so far is scaled to the new maximum.
static void weigh_row(const AttendTask& a, int r, int64_t first, int count, float* scores) {
  const int64_t from = a.from[r] - first, to = a.to[r] - first;
  const int low = int(from < 0 ? 0 : from < count ? from : count), high = int(to < 0 ? 0 : to < count ? to : count);
  if (low >= high) {
    __builtin_memset(scores, 0, size_t(count) * 4);
    return;
  }
  float top = a.top[r];
  for (int i = low; i < high; ++i) top = scores[i] > top ? scores[i] : top;
  for (int i = 0; i < low; ++i) scores[i] = -__builtin_inff();
  for (int i = high; i < kKeyBlock; ++i) scores[i] = -__builtin_inff();
  vf total{};
  for (int i = 0; i < kKeyBlock; i += kLanes) {
    const vf score = load<vf>(scores + i);
    // The polynomial stops at e^-87: what lies outside the row's keys must be zero itself.
    vf weight = score == -__builtin_inff() ? vf{} : exponential(score - top);
    total += weight;
    store(scores + i, weight);
  }
  const float shrink = a.top[r] == -__builtin_inff() ? 0.0f : exponential(splat(a.top[r] - top))[0];
  if (shrink != 1.0f)
    for (int64_t d = 0; d < a.value_width; ++d) a.out[r * a.value_width + d] *= shrink;
  a.total[r] = a.total[r] * shrink + sum(total);
  a.top[r] = top;
}

static void attend_compressed(const AttendTask& a);

static void attend(const AttendTask& a) {
  if (a.compressed()) return attend_compressed(a);
  alignas(64) float scores[kAttendRows][kKeyBlock];
  alignas(64) float panel[256][kPanelRows];
  alignas(64) float values[kKeyBlock][256];
  const int64_t width = a.head_dim;
  for (int r = 0; r < a.rows; ++r) {
    a.top[r] = -__builtin_inff();
    a.total[r] = 0.0f;
  }
  __builtin_memset(a.out, 0, size_t(a.rows * width) * 4);
  if (width % kPanelRows) __builtin_memset(values, 0, sizeof values);
  for (int64_t block = a.first / kKeyBlock; block * kKeyBlock < a.last; ++block) {
    const int64_t first = block * kKeyBlock;
    const int count = int(a.last - first < kKeyBlock ? a.last - first : kKeyBlock);
    score_block(a, cached_page(a, false, block), count, scores[0], panel);
    for (int r = 0; r < a.rows; ++r) weigh_row(a, r, first, count, scores[r]);
    const CachedPage page = cached_page(a, true, block);
    const float* from = values[0];
    int64_t stride = 256;
    if (page.storage == kCacheF32 && width % kPanelRows == 0) {
      from = reinterpret_cast<const float*>(page.rows);
      stride = width;
    } else {
      for (int key = 0; key < count; ++key) widen_cached(page, key, width, values[key]);
    }
    for (int64_t d = 0; d < width; d += kPanelRows) {
      const int here = int(width - d < kPanelRows ? width - d : kPanelRows);
      dense_tiles(from + d, stride, scores[0], kKeyBlock, count, false, here, a.rows, a.out + d, width);
    }
  }
}
