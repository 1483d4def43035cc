#include <algorithm>
#include <cmath>

#include "attention.h"
#include "product.h"

namespace coldstream {
namespace {

struct Step {
  const AttentionBlock& block;
  const KvCache& cache;
  int64_t tokens, position;
  const float *cosine, *sine;  // [T, rope_dim / 2]
  float *q, *k, *v;            // [T, heads * head_dim] and [T, kv_heads * head_dim]
};

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

// Norms, RoPE and temperature of one token's q or k, in place.
void finish_heads(const Step& step, int64_t t, float* row, int heads, const float* weight, bool query) {
  const AttentionBlock& b = step.block;
  const Kernels& table = kernels();
  const int64_t width = b.head_dim;
  if (b.qk_norm == kFullWidth) table.rms_norm(row, weight, heads * width, b.qk_eps, row);
  float factor = 1.0f;
  if (query) {
    factor = b.scaling;
    if (b.temperature_floor > 0) {
      const float position = float(step.position + t);
      factor *= std::log1p(std::floor((position + 1.0f) / b.temperature_floor)) * b.temperature_scale + 1.0f;
    }
  }
  for (int h = 0; h < heads; ++h) {
    float* head = row + h * width;
    if (b.qk_norm == kPerHead) table.rms_norm(head, weight, width, b.qk_eps, head);
    if (b.rope != kNoRope) {
      const int64_t angle = t * (b.rope_dim / 2);
      rotate(head, step.cosine + angle, step.sine + angle, b.rope, b.rope_dim);
    }
    if (b.l2_norm) table.rms_norm(head, nullptr, width, b.qk_eps, head);
    if (factor != 1.0f)
      for (int64_t i = 0; i < width; ++i) head[i] *= factor;
  }
}

uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void store_head(const KvCache& cache, bool values, int64_t head, int64_t row, const float* from, int64_t width) {
  void* base = values ? cache.values : cache.keys;
  const int64_t element = head * cache.head_stride + row * width;
  if (cache.storage == kCacheF32) {
    std::memcpy(static_cast<float*>(base) + element, from, size_t(width) * 4);
  } else if (cache.storage == kCacheBf16) {
    uint16_t* to = static_cast<uint16_t*>(base) + element;
    for (int64_t i = 0; i < width; ++i) to[i] = to_bf16(from[i]);
  } else {
    float absmax = 1e-12f;
    bool finite = true;
    for (int64_t i = 0; i < width; ++i) {
      absmax = std::max(absmax, std::fabs(from[i]));
      finite &= std::isfinite(from[i]);
    }
    const float scale = absmax / 127.0f;
    int8_t* to = static_cast<int8_t*>(base) + element;
    for (int64_t i = 0; i < width; ++i) to[i] = finite ? int8_t(std::nearbyint(from[i] / scale)) : int8_t(1);
    float* scales = values ? cache.value_scale : cache.key_scale;
    scales[head * cache.capacity + row] = finite ? scale : NAN;
  }
}

void finish_token(const Step& step, int64_t t) {
  const AttentionBlock& b = step.block;
  const int64_t width = b.head_dim, row = step.position + t - step.cache.first_position;
  float* k = step.k + t * b.kv_heads * width;
  finish_heads(step, t, step.q + t * b.heads * width, b.heads, b.q_norm, true);
  finish_heads(step, t, k, b.kv_heads, b.k_norm, false);
  for (int h = 0; h < b.kv_heads; ++h) {
    store_head(step.cache, false, h, row, k + h * width, width);
    store_head(step.cache, true, h, row, step.v + (t * b.kv_heads + h) * width, width);
  }
}

// softmax(q kᵀ) v into `out` [T, heads * head_dim]: tasks of a KV head, a few tokens and a run of keys.
void attend_all(const Step& step, float* out, Scratch& scratch) {
  const AttentionBlock& b = step.block;
  const Kernels& table = kernels();
  const int64_t width = b.head_dim, group = b.heads / b.kv_heads, wide = std::min<int64_t>(group, kAttendRows);
  const int64_t token_step = kAttendRows / wide, token_blocks = (step.tokens + token_step - 1) / token_step;
  const int64_t slices = (group + wide - 1) / wide;  // of a group with more heads than one task has rows
  const int64_t units = token_blocks * b.kv_heads * slices;
  const int64_t keys = step.position + step.tokens - step.cache.first_position;
  const int64_t runs = std::clamp<int64_t>(4 * thread_count() / units, 1, (keys + 255) / 256);
  const int64_t run = round_up((keys + runs - 1) / runs, 128);

  struct Part {
    float *q, *out, *top, *total;
  };
  const int64_t tasks = units * runs, part_floats = kAttendRows * (2 * width + 2);
  float* buffers = scratch.take<float>(tasks * part_floats);
  auto part_of = [&](int64_t task) {
    float* base = buffers + task * part_floats;
    float* after = base + 2 * kAttendRows * width;
    return Part{base, base + kAttendRows * width, after, after + kAttendRows};
  };
  auto head_row = [&](int64_t unit, int64_t r, float* base) {
    const int64_t slice = unit % slices, head = unit / slices % b.kv_heads, block = unit / slices / b.kv_heads;
    const int64_t t = block * token_step + r / wide, h = head * group + slice * wide + r % wide;
    return base + (t * b.heads + h) * width;
  };
  auto rows_of = [&](int64_t unit) {
    const int64_t slice = unit % slices, block = unit / slices / b.kv_heads;
    const int64_t last_heads = std::min(wide, group - slice * wide);
    return std::pair(std::min(token_step, step.tokens - block * token_step), last_heads);
  };
  parallel(tasks, [&](int64_t task, int) {
    const int64_t unit = task / runs, head = unit / slices % b.kv_heads, block = unit / slices / b.kv_heads;
    const auto [tokens, heads] = rows_of(unit);
    const Part part = part_of(task);
    int64_t from[kAttendRows], to[kAttendRows];
    int rows = 0;
    int64_t lowest = keys, highest = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t position = step.position + block * token_step + t;
      int64_t start = step.cache.first_position;
      if (b.chunk) start = std::max(start, position / b.chunk * b.chunk);
      if (b.window) start = std::max(start, position - b.window + 1);
      for (int64_t h = 0; h < heads; ++h, ++rows) {
        from[rows] = start - step.cache.first_position;
        to[rows] = position + 1 - step.cache.first_position;
        std::memcpy(part.q + rows * width, head_row(unit, t * wide + h, step.q), size_t(width) * 4);
      }
      lowest = std::min(lowest, from[rows - 1]);
      highest = std::max(highest, to[rows - 1]);
    }
    const int64_t first = std::max(task % runs * run, lowest), last = std::min((task % runs + 1) * run, highest);
    table.attend({&step.cache, part.q, from, to, head, width, first, last, rows, part.out, part.top, part.total});
  });
  parallel(units, [&](int64_t unit, int) {
    const auto [tokens, heads] = rows_of(unit);
    for (int64_t row = 0; row < tokens * heads; ++row) {
      float top = -INFINITY, total = 0;
      for (int64_t i = 0; i < runs; ++i) top = std::max(top, part_of(unit * runs + i).top[row]);
      float* to = head_row(unit, row / heads * wide + row % heads, out);
      std::memset(to, 0, size_t(width) * 4);
      for (int64_t i = 0; i < runs; ++i) {
        const Part part = part_of(unit * runs + i);
        if (part.top[row] == -INFINITY) continue;
        const float factor = std::exp(part.top[row] - top);
        total += part.total[row] * factor;
        table.add_scaled(to, part.out + row * width, width, factor);
      }
      for (int64_t i = 0; i < width; ++i) to[i] /= total;
    }
  });
}

void run_block(const AttentionBlock& b, const float* x, int64_t ldx, int64_t tokens, int64_t position,
               const float* cosine, const float* sine, const KvCache& cache, float* out, int64_t ldout, bool exact) {
  Scratch scratch;
  const Kernels& table = kernels();
  const int64_t hidden = b.q.k, q_width = int64_t(b.heads) * b.head_dim, kv_width = int64_t(b.kv_heads) * b.head_dim;
  const float* input = x;
  int64_t ldinput = ldx;
  if (b.norm) {
    float* normed = scratch.take<float>(tokens * hidden);
    for (int64_t t = 0; t < tokens; ++t) table.rms_norm(x + t * ldx, b.norm, hidden, b.eps, normed + t * hidden);
    input = normed;
    ldinput = hidden;
  }
  Step step{b,      cache, tokens, position, cosine, sine, scratch.take<float>(tokens * q_width),
            scratch.take<float>(tokens * kv_width), scratch.take<float>(tokens * kv_width)};
  Product products[] = {{b.q, input, ldinput, tokens, step.q, q_width, {}},
                        {b.k, input, ldinput, tokens, step.k, kv_width, {}},
                        {b.v, input, ldinput, tokens, step.v, kv_width, {}}};
  if (!exact) quantize_inputs(products, 3, scratch);
  multiply(products, 3, exact, scratch);
  add_bias(step.q, b.q_bias, tokens, q_width);
  add_bias(step.k, b.k_bias, tokens, kv_width);
  add_bias(step.v, b.v_bias, tokens, kv_width);
  if (tokens < 4)
    for (int64_t t = 0; t < tokens; ++t) finish_token(step, t);
  else
    parallel(tokens, [&](int64_t t, int) { finish_token(step, t); });

  float* attended = scratch.take<float>(tokens * q_width);
  attend_all(step, attended, scratch);
  Product last{b.o, attended, q_width, tokens, out, ldout, {}};
  if (!exact) quantize_inputs(&last, 1, scratch);
  multiply(&last, 1, exact, scratch);
  for (int64_t t = 0; t < tokens; ++t) {
    if (b.o_bias) table.add_scaled(out + t * ldout, b.o_bias, hidden, 1.0f);
    if (b.norm) table.add_scaled(out + t * ldout, x + t * ldx, hidden, 1.0f);
  }
}

}  // namespace
}  // namespace coldstream

// x + o(attention(norm(x))) of tokens at position, position + 1 …, whose keys and values are appended to the cache.
COLDSTREAM_API int32_t cs_attention(const coldstream::AttentionBlock* block, const float* x, int64_t ldx,
                                    int64_t tokens, int64_t position, const float* cosine, const float* sine,
                                    const coldstream::KvCache* cache, float* out, int64_t ldout, int32_t exact) {
  using namespace coldstream;
  constexpr int64_t kBlock = 256;
  return guarded([&] {
    for (int64_t first = 0; first < tokens; first += kBlock) {
      const int64_t angle = first * (block->rope_dim / 2);
      run_block(*block, x + first * ldx, ldx, std::min(kBlock, tokens - first), position + first,
                cosine ? cosine + angle : nullptr, sine ? sine + angle : nullptr, *cache, out + first * ldout, ldout,
                exact != 0);
    }
  });
}
