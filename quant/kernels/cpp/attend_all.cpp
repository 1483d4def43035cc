#include "attend_all.h"

#include <algorithm>
#include <cmath>

namespace coldstream {
namespace {

constexpr int64_t kRunsAtOnce = 64;  // whose sums wait to be merged: memory does not grow with the context
constexpr int64_t kRunTokens = 512;  // keys of one run: its sums are merged with others' in order, whoever made them

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
    const int64_t width = b.key_width(), first = run * kRunTokens;
    int64_t from[kAttendRows], until[kAttendRows], lowest = INT64_MAX, highest = 0;
    for (int64_t t = 0, r = 0; t < unit.tokens; ++t) {
      const int64_t position = unit.segment->position + unit.token + t, start = sees_from(position);
      for (int64_t h = 0; h < unit.heads; ++h, ++r) {
        from[r] = start;
        until[r] = position + 1;
        std::memcpy(q + r * width, row_of(unit, t, h, step_.q, width), size_t(width) * 4);
      }
      lowest = std::min(lowest, start);
      highest = position + 1;
    }
    kernels().attend({&step_.pool, unit.segment->pages, q, from, until, b.kv_heads, unit.kv_head, b.head_dim,
                      b.key_width(), b.value_width(), std::max(first, lowest), std::min(first + kRunTokens, highest), highest, int(unit.rows()), step_.exact,
                      to.out, to.top, to.total});
  }

  void finish(const Unit& unit, const Part& sum, float* out) const {
    const int64_t width = step_.block.value_width();
    const float* sinks = step_.block.sinks;
    for (int64_t t = 0, r = 0; t < unit.tokens; ++t)
      for (int64_t h = 0; h < unit.heads; ++h, ++r) {
        float *to = row_of(unit, t, h, out, width), total = sum.total[r], shrink = 1.0f;
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
  float* row_of(const Unit& unit, int64_t t, int64_t h, float* base, int64_t width) const {
    return base + ((unit.row + t) * step_.block.heads + unit.head + h) * width;
  }

  const Step& step_;
};

}  // namespace

void attend_all(const Step& step, float* out, Scratch& scratch) {
  const Units all(step);
  const int64_t width = step.block.value_width(), query = step.block.key_width(), count = int64_t(all.units.size());
  const bool shared = count < 4 * thread_count() && all.runs > count;
  const int64_t at_once = shared ? std::min(all.runs, std::max<int64_t>(kRunsAtOnce, 4 * thread_count())) : count;
  const int64_t part_floats = all.rows * (width + 2);
  float* queries = scratch.take<float>(at_once * all.rows * query);
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
        all.attend(unit, unit.first_run + run, queries + task * all.rows * query, more);
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
      all.attend(unit, unit.first_run + first + task - unit.part, queries + task * all.rows * query,
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

}  // namespace coldstream
