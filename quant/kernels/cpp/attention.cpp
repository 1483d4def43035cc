#include <algorithm>
#include <cmath>

#include "attention.h"
#include "product.h"

namespace coldstream {
namespace {

constexpr int64_t kRunsAtOnce = 64;  // whose sums wait to be merged: memory does not grow with the context
constexpr int64_t kRunTokens = 512;  // keys of one run: its sums are merged with others' in order, whoever made them

struct Step {
  const AttentionBlock& block;
  const KvPool& pool;
  const KvSegment* segments;
  int64_t count, tokens;       // segments, and rows of all of them
  const float *cosine, *sine;  // [T, rope_dim / 2]
  float *q, *k, *v;            // [T, heads * head_dim] and [T, kv_heads * head_dim]
  bool exact;
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

uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// One head of a token's keys or values, into `row`, counted over all pages and heads.
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

// Sums of some rows over some keys.
struct Part {
  float *out, *top, *total;  // [rows, head_dim], [rows], [rows]
};

// `more` is of keys after those of `sum`. Runs are always merged so, one after the other from the first: a row's result
// depends neither on how many threads there are nor on what they do beside it.
void merge(const Part& sum, const Part& more, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; ++r) {
    if (more.top[r] == -INFINITY) continue;
    float *to = sum.out + r * width, *from = more.out + r * width;
    if (sum.top[r] == -INFINITY) {
      std::memcpy(to, from, size_t(width) * 4);
      sum.top[r] = more.top[r];
      sum.total[r] = more.total[r];
      continue;
    }
    const float top = std::max(sum.top[r], more.top[r]);
    const float before = std::exp(sum.top[r] - top), after = std::exp(more.top[r] - top);
    for (int64_t i = 0; i < width; ++i) to[i] = to[i] * before + from[i] * after;
    sum.top[r] = top;
    sum.total[r] = sum.total[r] * before + more.total[r] * after;
  }
}

// Query rows that look at the keys of one KV head together: some tokens of a segment, some heads of the group.
struct Unit {
  const KvSegment* segment;
  int64_t row, token, tokens;     // the first token's row in q, its place in the segment, how many
  int64_t kv_head, head, heads;   // the first query head, how many
  int64_t first_run, runs, part;  // of the keys they see; where the sums of the first run are

  int64_t rows() const { return tokens * heads; }
};

class Units {
 public:
  explicit Units(const Step& step) : step_(step) {
    const AttentionBlock& b = step.block;
    const int64_t group = b.heads / b.kv_heads, wide = std::min<int64_t>(group, kAttendRows);
    const int64_t most = kAttendRows / wide;
    int64_t row = 0;
    for (int64_t i = 0; i < step.count; row += step.segments[i++].tokens) {
      const KvSegment& segment = step.segments[i];
      for (int64_t token = 0; token < segment.tokens; token += most) {
        const int64_t tokens = std::min(most, segment.tokens - token), position = segment.position + token;
        const int64_t first = sees_from(position) / kRunTokens, last = (position + tokens - 1) / kRunTokens;
        for (int64_t kv_head = 0; kv_head < b.kv_heads; ++kv_head)
          for (int64_t head = 0; head < group; head += wide) {
            units.push_back({&segment, row + token, token, tokens, kv_head, kv_head * group + head,
                             std::min(wide, group - head), first, last - first + 1, runs});
            runs += last - first + 1;
            rows = std::max(rows, tokens * wide);
          }
      }
    }
  }

  int64_t sees_from(int64_t position) const {
    const AttentionBlock& b = step_.block;
    int64_t from = 0;
    if (b.chunk) from = position / b.chunk * b.chunk;
    if (b.window) from = std::max(from, position - b.window + 1);
    return from;
  }

  // The rows' sums over the keys of one run.
  void attend(const Unit& unit, int64_t run, float* q, const Part& to) const {
    const AttentionBlock& b = step_.block;
    const int64_t width = b.head_dim, first = run * kRunTokens;
    int64_t from[kAttendRows], until[kAttendRows], lowest = INT64_MAX, highest = 0;
    for (int64_t t = 0, r = 0; t < unit.tokens; ++t) {
      const int64_t position = unit.segment->position + unit.token + t, start = sees_from(position);
      for (int64_t h = 0; h < unit.heads; ++h, ++r) {
        from[r] = start;
        until[r] = position + 1;
        std::memcpy(q + r * width, row_of(unit, t, h, step_.q), size_t(width) * 4);
      }
      lowest = std::min(lowest, start);
      highest = position + 1;
    }
    kernels().attend({&step_.pool, unit.segment->pages, q, from, until, b.kv_heads, unit.kv_head, width,
                      std::max(first, lowest), std::min(first + kRunTokens, highest), highest, int(unit.rows()), step_.exact,
                      to.out, to.top, to.total});
  }

  void finish(const Unit& unit, const Part& sum, float* out) const {
    const int64_t width = step_.block.head_dim;
    const float* sinks = step_.block.sinks;
    for (int64_t t = 0, r = 0; t < unit.tokens; ++t)
      for (int64_t h = 0; h < unit.heads; ++h, ++r) {
        float *to = row_of(unit, t, h, out), total = sum.total[r], shrink = 1.0f;
        if (sinks) {
          const float sink = sinks[unit.head + h], top = std::max(sum.top[r], sink);
          shrink = std::exp(sum.top[r] - top);
          total = total * shrink + std::exp(sink - top);
        }
        for (int64_t i = 0; i < width; ++i) to[i] = sum.out[r * width + i] * shrink / total;
      }
  }

  std::vector<Unit> units;
  int64_t runs = 0, rows = 0;  // of all units; of the largest

 private:
  float* row_of(const Unit& unit, int64_t t, int64_t h, float* base) const {
    return base + ((unit.row + t) * step_.block.heads + unit.head + h) * step_.block.head_dim;
  }

  const Step& step_;
};

// softmax(q kᵀ) v into `out` [T, heads * head_dim]. Where there are few units, threads share the runs of each.
void attend_all(const Step& step, float* out, Scratch& scratch) {
  const Units all(step);
  const int64_t width = step.block.head_dim, count = int64_t(all.units.size());
  const bool shared = count < 4 * thread_count() && all.runs > count;
  const int64_t at_once = shared ? std::min(all.runs, std::max<int64_t>(kRunsAtOnce, 4 * thread_count())) : count;
  const int64_t part_floats = all.rows * (width + 2);
  float* queries = scratch.take<float>(at_once * all.rows * width);
  float* sums = scratch.take<float>((count + at_once) * part_floats);
  auto part = [&](int64_t index) {
    float* base = sums + index * part_floats;
    return Part{base, base + all.rows * width, base + all.rows * (width + 1)};
  };
  auto add = [&](const Unit& unit, int64_t run, int64_t index, const Part& more) {
    const Part sum = part(index);
    if (run) return merge(sum, more, unit.rows(), width);
    std::memcpy(sum.out, more.out, size_t(unit.rows() * width) * 4);
    std::memcpy(sum.top, more.top, size_t(unit.rows()) * 4);
    std::memcpy(sum.total, more.total, size_t(unit.rows()) * 4);
  };
  if (!shared) {
    parallel(count, [&](int64_t task, int) {
      const Unit& unit = all.units[size_t(task)];
      const Part more = part(count + task);
      for (int64_t run = 0; run < unit.runs; ++run) {
        all.attend(unit, unit.first_run + run, queries + task * all.rows * width, more);
        add(unit, run, task, more);
      }
      all.finish(unit, part(task), out);
    });
    return;
  }
  for (int64_t first = 0; first < all.runs; first += at_once) {
    const int64_t last = std::min(first + at_once, all.runs);
    parallel(last - first, [&](int64_t task, int) {
      auto next = std::upper_bound(all.units.begin(), all.units.end(), first + task,
                                   [](int64_t value, const Unit& unit) { return value < unit.part; });
      const Unit& unit = *--next;
      all.attend(unit, unit.first_run + first + task - unit.part, queries + task * all.rows * width,
                 part(count + task));
    });
    parallel(count, [&](int64_t task, int) {
      const Unit& unit = all.units[size_t(task)];
      for (int64_t run = std::max(first, unit.part); run < std::min(last, unit.part + unit.runs); ++run)
        add(unit, run - unit.part, task, part(count + run - first));
    });
  }
  parallel(count, [&](int64_t task, int) { all.finish(all.units[size_t(task)], part(task), out); });
}

}  // namespace

void attend_segments(const AttentionBlock& b, const float* x, int64_t ldx, const KvSegment* segments, int64_t count,
                     const float* cosine, const float* sine, const KvPool& pool, float* out, int64_t ldout,
                     bool exact) {
  int64_t tokens = 0;
  for (int64_t i = 0; i < count; ++i) tokens += segments[i].tokens;
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
  Step step{b,      pool, segments, count, tokens, cosine, sine, scratch.take<float>(tokens * q_width),
            scratch.take<float>(tokens * kv_width), scratch.take<float>(tokens * kv_width), exact};
  Product products[] = {{b.q, input, ldinput, tokens, step.q, q_width, {}},
                        {b.k, input, ldinput, tokens, step.k, kv_width, {}},
                        {b.v, input, ldinput, tokens, step.v, kv_width, {}}};
  if (!exact) quantize_inputs(products, 3, scratch);
  multiply(products, 3, exact, scratch);
  add_bias(step.q, b.q_bias, tokens, q_width);
  add_bias(step.k, b.k_bias, tokens, kv_width);
  add_bias(step.v, b.v_bias, tokens, kv_width);
  int64_t row = 0;
  for (int64_t i = 0; i < count; row += segments[i++].tokens) {
    const KvSegment& segment = segments[i];
    auto finish = [&](int64_t t, int) { finish_token(step, segment, row + t, segment.position + t); };
    if (segment.tokens < 4)
      for (int64_t t = 0; t < segment.tokens; ++t) finish(t, 0);
    else
      parallel(segment.tokens, finish);
  }

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

}  // namespace coldstream

// x + o(attention(norm(x))) of tokens at position, position + 1 …, whose keys and values are appended to the pages.
COLDSTREAM_API int32_t cs_attention(const coldstream::AttentionBlock* block, const float* x, int64_t ldx,
                                    int64_t tokens, int64_t position, const float* cosine, const float* sine,
                                    const coldstream::KvPool* pool, const int32_t* pages, float* out, int64_t ldout,
                                    int32_t exact) {
  using namespace coldstream;
  constexpr int64_t kBlock = 256;
  return guarded([&] {
    for (int64_t first = 0; first < tokens; first += kBlock) {
      const int64_t angle = first * (block->rope_dim / 2);
      const KvSegment segment{pages, position + first, std::min(kBlock, tokens - first)};
      attend_segments(*block, x + first * ldx, ldx, &segment, 1, cosine ? cosine + angle : nullptr,
                      sine ? sine + angle : nullptr, *pool, out + first * ldout, ldout, exact != 0);
    }
  });
}
