// Softmax attention with the processor's bf16 dot products: pairs of channels for the scores, pairs of keys for the
// values, twice as fast as f32. Queries and weights are rounded to bf16, cached keys and values are what they are. Keys of
// a page are transposed once for all rows of the task, its values interleaved once.

constexpr int kMostPairs = 128;  // of channels
constexpr int kTileRows = 6;
typedef __m512bh bh;

INLINE bh to_bf16(vf low, vf high) { return _mm512_cvtne2ps_pbh((__m512)high, (__m512)low); }

INLINE bh splat_pair(const uint16_t* pair) {
  int32_t word;
  __builtin_memcpy(&word, pair, 4);
  return (bh)_mm512_set1_epi32(word);
}

// to[pair of channels][key]; keys past `count` are zero.
static void pack_keys(const CachedPage& page, int64_t width, int count, uint32_t (*to)[kKeyBlock]) {
  const int64_t row_bytes = width * 2;
  for (int key = 0; key < count; key += kLanes)
    for (int64_t channel = 0; channel < width; channel += 2 * kLanes) {
      vi m[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const int64_t place = (key + i) * row_bytes + channel * 2;
        __builtin_prefetch(page.next + place, 0, 2);
        m[i] = key + i < count ? load<vi>(page.rows + place) : vi{};
      }
      transpose(m);
      for (int i = 0; i < kLanes; ++i) store(to[channel / 2 + i] + key, m[i]);
    }
}

// to[pair of keys][channel]; a last key without a second one is paired with zeros.
static void pack_values(const CachedPage& page, int64_t width, int count, uint32_t (*to)[2 * kMostPairs]) {
  const int64_t row_bytes = width * 2;
  uint16_t order[2 * kLanes];  // one of the first row, one of the second
  for (int i = 0; i < 2 * kLanes; ++i) order[i] = uint16_t(i / 2 + i % 2 * 2 * kLanes);
  const __m512i low = _mm512_loadu_si512(order), high = _mm512_add_epi16(low, _mm512_set1_epi16(kLanes));
  for (int key = 0; key < count; key += 2)
    for (int64_t channel = 0; channel < width; channel += 2 * kLanes) {
      const int64_t place = key * row_bytes + channel * 2;
      __builtin_prefetch(page.next + place, 0, 2);
      __builtin_prefetch(page.next + place + row_bytes, 0, 2);
      const __m512i a = _mm512_loadu_si512(page.rows + place);
      const __m512i b = key + 1 < count ? _mm512_loadu_si512(page.rows + place + row_bytes) : _mm512_setzero_si512();
      store(to[key / 2] + channel, (vi)_mm512_permutex2var_epi16(a, low, b));
      store(to[key / 2] + channel + kLanes, (vi)_mm512_permutex2var_epi16(a, high, b));
    }
}

// y[r][i] (+)= sum over pairs of x[r][pair] · panel[pair][i], kCount vectors of i.
template <int kRows, int kCount>
static void pair_tile(const uint32_t* panel, int64_t stride, const uint16_t* x, int64_t ldx, int pairs, bool add,
                      float* y, int64_t ldy) {
  __m512 acc[kRows][kCount];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kCount; ++v)
      acc[r][v] = add ? _mm512_loadu_ps(y + r * ldy + v * kLanes) : _mm512_setzero_ps();
  for (int pair = 0; pair < pairs; ++pair, panel += stride) {
    bh column[kCount];
    for (int v = 0; v < kCount; ++v) column[v] = (bh)_mm512_loadu_si512(panel + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const bh factor = splat_pair(x + r * ldx + 2 * pair);
      for (int v = 0; v < kCount; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], factor, column[v]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kCount; ++v) _mm512_storeu_ps(y + r * ldy + v * kLanes, acc[r][v]);
}

template <int kRows, int kCount>
static void pair_rows(const uint32_t* panel, int64_t stride, const uint16_t* x, int64_t ldx, int pairs, bool add,
                      int rows, float* y, int64_t ldy) {
  for (; rows >= kRows; rows -= kRows, x += kRows * ldx, y += kRows * ldy)
    pair_tile<kRows, kCount>(panel, stride, x, ldx, pairs, add, y, ldy);
  if constexpr (kRows > 1)
    if (rows) pair_rows<kRows - 1, kCount>(panel, stride, x, ldx, pairs, add, rows, y, ldy);
}

// Four vectors of columns at a time, or two where no more are left.
static void pair_tiles(const uint32_t* panel, int64_t stride, const uint16_t* x, int64_t ldx, int pairs, bool add,
                       int rows, int64_t columns, float* y, int64_t ldy) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= columns; i += 4 * kLanes)
    pair_rows<kTileRows, 4>(panel + i, stride, x, ldx, pairs, add, rows, y + i, ldy);
  for (; i < columns; i += 2 * kLanes)
    pair_rows<kTileRows, 2>(panel + i, stride, x, ldx, pairs, add, rows, y + i, ldy);
}

// Scores of one row to weights in bf16; the row's output so far is scaled to the new maximum.
static void weigh_pairs(const AttendTask& a, int r, int64_t first, int count, float* scores, uint16_t* weights) {
  const int64_t from = a.from[r] - first, to = a.to[r] - first;
  const int low = int(from < 0 ? 0 : from < count ? from : count), high = int(to < 0 ? 0 : to < count ? to : count);
  if (low >= high) {
    __builtin_memset(weights, 0, kKeyBlock * 2);
    return;
  }
  const vi lanes = (vi)_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const vf nothing = splat(-__builtin_inff());
  vf largest_of = nothing;
  for (int i = 0; i < kKeyBlock; i += kLanes) {
    vf score = load<vf>(scores + i);
    const vi key = lanes + i;
    score = (key >= low) & (key < high) ? score : nothing;
    largest_of = larger(score, largest_of);
    store(scores + i, score);
  }
  float top = a.top[r];
  for (int i = 0; i < kLanes; ++i) top = largest_of[i] > top ? largest_of[i] : top;
  vf total{};
  for (int i = 0; i < kKeyBlock; i += 2 * kLanes) {
    vf pair[2];
    for (int j = 0; j < 2; ++j) {
      const vf score = load<vf>(scores + i + j * kLanes);
      // The polynomial stops at e^-87: what lies outside the row's keys must be zero itself.
      pair[j] = score == nothing ? vf{} : rough_exponential(score - top);
      total += pair[j];
    }
    store(weights + i, to_bf16(pair[0], pair[1]));
  }
  const float shrink = a.top[r] == -__builtin_inff() ? 0.0f : exponential(splat(a.top[r] - top))[0];
  if (shrink != 1.0f)
    for (int64_t d = 0; d < a.value_width; ++d) a.out[r * a.value_width + d] *= shrink;
  a.total[r] = a.total[r] * shrink + sum(total);
  a.top[r] = top;
}

#include "attend_few.inl"
#include "attend_latents.inl"

static void attend_pairs(const AttendTask& a) {
  if (a.compressed()) return attend_latents(a);
  const int64_t width = a.head_dim;
  if (a.exact || a.pool->storage != kCacheBf16 || width % (2 * kLanes)) return attend_plain_or_bytes(a);
  alignas(64) float scores[kAttendRows][kKeyBlock];
  alignas(64) uint16_t q[kAttendRows][2 * kMostPairs], weights[kAttendRows][kKeyBlock];
  alignas(64) uint32_t keys[kMostPairs][kKeyBlock], values[kKeyBlock / 2][2 * kMostPairs];
  for (int r = 0; r < a.rows; ++r) {
    a.top[r] = -__builtin_inff();
    a.total[r] = 0.0f;
    for (int64_t d = 0; d < width; d += 2 * kLanes) {
      const float* from = a.q + r * width + d;
      store(q[r] + d, to_bf16(load<vf>(from), load<vf>(from + kLanes)));
    }
  }
  __builtin_memset(a.out, 0, size_t(a.rows * width) * 4);
  if (a.rows <= kFewRows) return attend_few<kFewRows>(a, q);
  for (int64_t block = a.first / kKeyBlock; block * kKeyBlock < a.last; ++block) {
    const int64_t first = block * kKeyBlock;
    const int count = int(a.last - first < kKeyBlock ? a.last - first : kKeyBlock);
    const CachedPage its_keys = cached_page(a, false, block), its_values = cached_page(a, true, block);
    pack_keys(its_keys, width, count, keys);
    pair_tiles(keys[0], kKeyBlock, q[0], 2 * kMostPairs, int(width / 2), false, a.rows, round_up(count, 2 * kLanes),
               scores[0], kKeyBlock);
    for (int r = 0; r < a.rows; ++r) weigh_pairs(a, r, first, count, scores[r], weights[r]);
    pack_values(its_values, width, count, values);
    pair_tiles(values[0], 2 * kMostPairs, weights[0], kKeyBlock, (count + 1) / 2, true, a.rows, width, a.out, width);
  }
}
