#include <algorithm>
#include <cmath>

#include "attend_all.h"

namespace coldstream {

void add_bias(float* rows, const float* bias, int64_t tokens, int64_t width) {
  if (!bias) return;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < width; ++i) rows[t * width + i] += bias[i];
}

void rotate(float* head, const float* cosine, const float* sine, int rope, int width) {
  const int half = width / 2, step = rope == kInterleaved ? 2 : 1, gap = rope == kInterleaved ? 1 : half;
  for (int i = 0; i < half; ++i) {
    float *a = head + i * step, *b = a + gap;
    const float x = *a, y = *b;
    *a = x * cosine[i] - y * sine[i];
    *b = x * sine[i] + y * cosine[i];
  }
}

namespace {

uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace

void store_head(const KvPool& pool, bool values, int64_t row, const float* from, int64_t width) {
  void* base = values ? pool.values : pool.keys;
  if (pool.storage == kCacheF32) {
    std::memcpy(static_cast<float*>(base) + row * width, from, size_t(width) * 4);
  } else if (pool.storage == kCacheBf16) {
    uint16_t* to = static_cast<uint16_t*>(base) + row * width;
    for (int64_t i = 0; i < width; ++i) to[i] = to_bf16(from[i]);
  } else {
    float absmax = 1e-12f;
    bool finite = true;
    for (int64_t i = 0; i < width; ++i) {
      absmax = std::max(absmax, std::fabs(from[i]));
      finite &= std::isfinite(from[i]);
    }
    const float scale = absmax / 127.0f;
    const bool blocks = pool.storage == kCacheInt8Blocks;
    const int64_t token = row % kPageTokens;
    int8_t* to = static_cast<int8_t*>(base) + (blocks ? row - token : row) * width;
    for (int64_t i = 0; i < width; ++i) {
      const int value = finite ? int(std::nearbyint(from[i] / scale)) : 1;
      if (!blocks) to[i] = int8_t(value);
      else if (values) to[value_place(token, i, width)] = int8_t(value);
      else to[key_place(token, i, width)] = int8_t(uint8_t(value + 128));
    }
    (values ? pool.value_scale : pool.key_scale)[row] = finite ? scale : NAN;
  }
}

namespace {

// Norms, RoPE and temperature of one token's q or k, in place.
void finish_heads(const Step& step, int64_t t, int64_t position, float* row, int heads, const float* weight,
                  bool query) {
  const AttentionBlock& b = step.block;
  const Kernels& table = kernels();
  const int64_t width = b.head_dim;
  if (b.qk_norm == kFullWidth) table.rms_norm(row, weight, heads * width, b.qk_eps, row);
  float factor = 1.0f;
  if (query) {
    factor = b.scaling;
    if (b.temperature_floor > 0) {
      const float seen = float(position) + 1.0f;
      factor *= std::log1p(std::floor(seen / b.temperature_floor)) * b.temperature_scale + 1.0f;
    }
  }
  for (int h = 0; h < heads; ++h) {
    float* head = row + h * width;
    if (b.qk_norm == kPerHead) table.rms_norm(head, weight, width, b.qk_eps, head);
    if (b.rope != kNoRope) {
      const int64_t angle = t * (b.rope_dim / 2);
      rotate(head, step.cosine + angle, step.sine + angle, b.rope, b.rope_dim);
    }
    if (b.qk_norm == kPerHeadAfterRope) table.rms_norm(head, weight, width, b.qk_eps, head);
    if (b.l2_norm) table.rms_norm(head, nullptr, width, b.qk_eps, head);
    if (factor != 1.0f)
      for (int64_t i = 0; i < width; ++i) head[i] *= factor;
  }
}

// `t` counts the rows of all segments.
void finish_token(const Step& step, const KvSegment& segment, int64_t t, int64_t position) {
  const AttentionBlock& b = step.block;
  const int64_t width = b.head_dim, page = segment.pages[position / kPageTokens];
  float* k = step.k + t * b.kv_heads * width;
  finish_heads(step, t, position, step.q + t * b.heads * width, b.heads, b.q_norm, true);
  finish_heads(step, t, position, k, b.kv_heads, b.k_norm, false);
  for (int h = 0; h < b.kv_heads; ++h) {
    const int64_t row = (page * b.kv_heads + h) * kPageTokens + position % kPageTokens;
    store_head(step.pool, false, row, k + h * width, width);
    store_head(step.pool, true, row, step.v + (t * b.kv_heads + h) * width, width);
  }
}

// Queries, keys and values of all rows, as `step` keeps them, and in the cache.
void project(const Step& step, const float* input, int64_t ldinput, Scratch& scratch) {
  const AttentionBlock& b = step.block;
  const int64_t tokens = step.tokens, q_width = b.q.n, kv_width = b.k.n;
  Product products[] = {{b.q, input, ldinput, tokens, step.q, q_width, {}},
                        {b.k, input, ldinput, tokens, step.k, kv_width, {}},
                        {b.v, input, ldinput, tokens, step.v, kv_width, {}}};
  if (!step.exact) quantize_inputs(products, 3, scratch);
  multiply(products, 3, step.exact, scratch);
  add_bias(step.q, b.q_bias, tokens, q_width);
  add_bias(step.k, b.k_bias, tokens, kv_width);
  add_bias(step.v, b.v_bias, tokens, kv_width);
  int64_t row = 0;
  for (int64_t i = 0; i < step.count; row += step.segments[i++].tokens) {
    const KvSegment& segment = step.segments[i];
    auto finish = [&](int64_t t, int) { finish_token(step, segment, row + t, segment.position + t); };
    if (segment.tokens < 4)
      for (int64_t t = 0; t < segment.tokens; ++t) finish(t, 0);
    else
      parallel(segment.tokens, finish);
  }
}

}  // namespace

void attend_segments(const AttentionBlock& b, const float* x, int64_t ldx, const KvSegment* segments, int64_t count,
                     const float* cosine, const float* sine, const KvPool& pool, float* out, int64_t ldout,
                     bool exact) {
  int64_t tokens = 0;
  for (int64_t i = 0; i < count; ++i) tokens += segments[i].tokens;
  Scratch scratch;
  const Kernels& table = kernels();
  const int64_t hidden = b.o.n, q_width = int64_t(b.heads) * b.head_dim, kv_width = int64_t(b.kv_heads) * b.head_dim;
  const float* input = x;
  int64_t ldinput = ldx;
  if (b.norm) {
    float* normed = scratch.take<float>(tokens * hidden);
    for (int64_t t = 0; t < tokens; ++t) table.rms_norm(x + t * ldx, b.norm, hidden, b.eps, normed + t * hidden);
    input = normed;
    ldinput = hidden;
  }
  float* attended = scratch.take<float>(tokens * b.o.k);
  if (b.latent) {
    const Step step{b, pool, segments, count, tokens, cosine, sine, nullptr, nullptr, nullptr, exact};
    attend_compressed(step, input, ldinput, attended, scratch);
  } else {
    const Step step{b,      pool, segments, count, tokens, cosine, sine, scratch.take<float>(tokens * q_width),
                    scratch.take<float>(tokens * kv_width), scratch.take<float>(tokens * kv_width), exact};
    project(step, input, ldinput, scratch);
    attend_all(step, attended, scratch);
  }
  Product last{b.o, attended, b.o.k, tokens, out, ldout, {}};
  if (!exact) quantize_inputs(&last, 1, scratch);
  multiply(&last, 1, exact, scratch);
  for (int64_t t = 0; t < tokens; ++t) {
    if (b.o_bias) table.add_scaled(out + t * ldout, b.o_bias, hidden, 1.0f);
    if (b.norm) table.add_scaled(out + t * ldout, x + t * ldx, hidden, 1.0f);
  }
}

}  // namespace coldstream

// x + o(attention(norm(x))) of tokens at position, position + 1 …, whose keys and values are appended to the pages.
COLDSTREAM_API int32_t cs_attention(const coldstream::AttentionBlock* block, const float* x, int64_t ldx,
                                    int64_t tokens, int64_t position, const float* cosine, const float* sine,
                                    const coldstream::KvPool* pool, const int32_t* pages, float* out, int64_t ldout,
                                    int32_t exact) {
  using namespace coldstream;
  // What queries, sums and outputs take does not grow with the prompt; but pages that are elsewhere are brought once for
  // all of it.
  const int64_t least = block->latent ? std::max<int64_t>(32, std::min<int64_t>(256, 4096 / block->heads)) : 256;
  const int64_t at_once = pool->bring && !block->latent ? tokens : least;
  KvPool all = *pool;
  all.bounds = nullptr;  // a prompt reads everything
  return guarded([&] {
    for (int64_t first = 0; first < tokens; first += at_once) {
      const int64_t angle = first * (block->rope_dim / 2);
      const KvSegment segment{pages, position + first, std::min(at_once, tokens - first)};
      attend_segments(*block, x + first * ldx, ldx, &segment, 1, cosine ? cosine + angle : nullptr,
                      sine ? sine + angle : nullptr, all, out + first * ldout, ldout, exact != 0);
    }
  });
}
