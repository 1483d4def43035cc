// The sums of attention: which query rows look at which keys together, and the softmax of these over runs of keys, merged
// in an order that depends on nothing but the keys.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "attend_all.h"

namespace coldstream {

constexpr int64_t kRunsAtOnce = 64;  // whose sums wait to be merged: memory does not grow with the context
constexpr int64_t kRunPages = kRunTokens / kPageTokens;

// Sums of some rows over some keys.
struct Part {
  float *out, *top, *total;  // [rows, value_width], [rows], [rows]
};

// `more` is of keys after those of `sum`. Runs are always merged so, one after the other from the first: a row's result
// depends neither on how many threads there are, nor on what they do beside it, nor on where pages are.
inline void merge(const Part& sum, const Part& more, int64_t rows, int64_t width) {
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
    // One of both is 1. A NaN is neither.
    const float before = sum.top[r] == top ? 1.0f : std::exp(sum.top[r] - top);
    const float after = more.top[r] == top ? 1.0f : std::exp(more.top[r] - top);
    kernels().blend(to, from, width, before, after);
    sum.top[r] = top;
    sum.total[r] = sum.total[r] * before + more.total[r] * after;
  }
}

// Query rows that look at the keys of one KV head together: some tokens of a segment, some heads of the group.
struct Unit {
  int64_t segment;
  int64_t row, token, tokens;    // the first token's row in q, its place in the segment, how many
  int64_t kv_head, head, heads;  // the first query head, how many
  int64_t first_run, last_run;   // of the keys they see, the last not among them

  int64_t rows() const { return tokens * heads; }
};

// How many query heads of a group a unit takes. Compressed keys have one group of all heads: for a few tokens it is shared
// out, so that each thread has some at any length of the text.
inline int64_t heads_at_once(const Step& step) {
  constexpr int64_t kLeast = 4;  // fewer would not pay for reading the keys
  const int64_t group = step.block.heads / step.block.kv_heads;
  int64_t parts = (group + kAttendRows - 1) / kAttendRows;
  if (step.block.latent) parts = std::max(parts, (thread_count() + step.tokens - 1) / step.tokens);
  return std::min(group, round_up((group + parts - 1) / parts, kLeast));
}

// Keys that are in pages at the same time: runs of one table, and where they end.
struct Piece {
  const int32_t* pages;
  int64_t first_run, last_run, end;
};

// Some pages of one run that a unit reads, the last one up to some key of it.
struct Pick {
  int64_t unit;
  const int32_t* pages;
  int64_t keys, ahead;  // of these pages, and of those that follow in memory
};

class Units {
 public:
  // Of at most `together` tokens each.
  explicit Units(const Step& step, int64_t together = kAttendRows) : step_(step) {
    const AttentionBlock& b = step.block;
    const int64_t group = b.heads / b.kv_heads, wide = heads_at_once(step);
    const int64_t most = std::min(together, kAttendRows / wide);
    int64_t row = 0;
    for (int64_t i = 0; i < step.count; row += step.segments[i++].tokens) {
      const KvSegment& segment = step.segments[i];
      first_of.push_back(int64_t(units.size()));
      for (int64_t token = 0; token < segment.tokens; token += most) {
        const int64_t tokens = std::min(most, segment.tokens - token), position = segment.position + token;
        const int64_t first = sees_from(position) / kRunTokens, last = (position + tokens - 1) / kRunTokens;
        for (int64_t kv_head = 0; kv_head < b.kv_heads; ++kv_head)
          for (int64_t head = 0; head < group; head += wide) {
            units.push_back({i, row + token, token, tokens, kv_head, kv_head * group + head,
                             std::min(wide, group - head), first, last + 1});
            rows = std::max(rows, tokens * wide);
          }
      }
    }
    first_of.push_back(int64_t(units.size()));
  }

  int64_t sees_from(int64_t position) const {
    const AttentionBlock& b = step_.block;
    int64_t from = 0;
    if (b.chunk) from = position / b.chunk * b.chunk;
    if (b.window) from = std::max(from, position - b.window + 1);
    return from;
  }

  // The rows' sums over the keys of one run of `piece`.
  void attend(const Unit& unit, const Piece& piece, int64_t run, float* q, const Part& to) const {
    const AttentionBlock& b = step_.block;
    const int64_t width = b.key_width(), first = run * kRunTokens;
    int64_t from[kAttendRows], until[kAttendRows], lowest = INT64_MAX, highest = 0;
    for (int64_t t = 0, r = 0; t < unit.tokens; ++t) {
      const int64_t position = step_.segments[unit.segment].position + unit.token + t, start = sees_from(position);
      for (int64_t h = 0; h < unit.heads; ++h, ++r) {
        from[r] = start;
        until[r] = position + 1;
        std::memcpy(q + r * width, step_.q + place(unit, t, h, width), size_t(width) * 4);
      }
      lowest = std::min(lowest, start);
      highest = position + 1;
    }
    kernels().attend({&step_.pool, piece.pages, q, from, until, b.kv_heads, unit.kv_head, b.head_dim, width,
                      b.value_width(), std::max(first, lowest), std::min(first + kRunTokens, highest),
                      std::min(highest, piece.end), int(unit.rows()), step_.exact, to.out, to.top, to.total});
  }

  // The same over picked pages, which all rows see.
  void attend(const Pick& pick, float* q, const Part& to) const {
    const AttentionBlock& b = step_.block;
    const Unit& unit = units[size_t(pick.unit)];
    const std::vector<int64_t> from(size_t(unit.rows()), 0), until(size_t(unit.rows()), pick.keys);
    queries(unit, q);
    kernels().attend({&step_.pool, pick.pages, q, from.data(), until.data(), b.kv_heads, unit.kv_head, b.head_dim,
                      b.key_width(), b.value_width(), 0, pick.keys, pick.ahead, int(unit.rows()), step_.exact, to.out,
                      to.top, to.total});
  }

  void queries(const Unit& unit, float* to) const {
    const int64_t width = step_.block.key_width();
    for (int64_t t = 0; t < unit.tokens; ++t, to += unit.heads * width)
      std::memcpy(to, step_.q + place(unit, t, 0, width), size_t(unit.heads * width) * 4);
  }

  int64_t position(const Unit& unit) const { return step_.segments[unit.segment].position + unit.token; }

  void finish(const Unit& unit, const Part& sum, float* out) const {
    const int64_t width = step_.block.value_width();
    const float* sinks = step_.block.sinks;
    for (int64_t t = 0, r = 0; t < unit.tokens; ++t)
      for (int64_t h = 0; h < unit.heads; ++h, ++r) {
        float *to = out + place(unit, t, h, width), total = sum.total[r], shrink = 1.0f;
        if (sinks) {
          const float sink = sinks[unit.head + h], top = std::max(sum.top[r], sink);
          shrink = std::exp(sum.top[r] - top);
          total = total * shrink + std::exp(sink - top);
        }
        for (int64_t i = 0; i < width; ++i) to[i] = sum.out[r * width + i] * shrink / total;
      }
  }

  std::vector<Unit> units;
  std::vector<int64_t> first_of;  // [segments + 1]: the first unit of each segment, and how many there are
  int64_t rows = 0;               // of the largest

 private:
  int64_t place(const Unit& unit, int64_t t, int64_t h, int64_t width) const {
    return ((unit.row + t) * step_.block.heads + unit.head + h) * width;
  }

  const Step& step_;
};

// The sums of all units, to which pieces of the keys are added, those of a segment in ascending order.
class Sums {
 public:
  Sums(const Units& all, int64_t query, int64_t width, Scratch& scratch, bool picked = false)
      : all_(all),
        query_(query),
        width_(width),
        count_(int64_t(all.units.size())),
        few_(picked || count_ < 4 * thread_count()) {
    at_once_ = few_ ? std::max<int64_t>(kRunsAtOnce, 4 * thread_count()) : thread_count();
    queries_ = scratch.take<float>(at_once_ * all.rows * query);
    sums_ = scratch.take<float>((count_ + at_once_) * all.rows * (width + 2));
    std::memset(sums_, 0, size_t(count_ * all.rows * (width + 2)) * 4);
    for (int64_t unit = 0; unit < count_; ++unit) std::fill_n(part(unit).top, all.rows, -INFINITY);
  }

  // `pieces` of some segments: each is seen by the units of its own. Where there are few units, threads share the runs
  // of each.
  void add(const std::vector<Piece>& pieces, int64_t first_segment) {
    struct Work {
      int64_t unit, first_run, last_run, before;
      const Piece* piece;
    };
    std::vector<Work> works;
    int64_t runs = 0;
    for (size_t i = 0; i < pieces.size(); ++i)
      for (int64_t u = all_.first_of[size_t(first_segment) + i]; u < all_.first_of[size_t(first_segment) + i + 1]; ++u) {
        const Unit& unit = all_.units[size_t(u)];
        const int64_t first = std::max(unit.first_run, pieces[i].first_run);
        const int64_t last = std::min(unit.last_run, pieces[i].last_run);
        if (first >= last) continue;
        works.push_back({u, first, last, runs, &pieces[i]});
        runs += last - first;
      }
    const int64_t count = int64_t(works.size());
    if (!few_ || runs == count) {  // few units are no more than can wait at once
      parallel(count, [&](int64_t task, int worker) {
        const Work& work = works[size_t(task)];
        const int64_t place = few_ ? task : worker;
        for (int64_t run = work.first_run; run < work.last_run; ++run) {
          attend(work.unit, *work.piece, run, place);
          take(work.unit, place);
        }
      });
      return;
    }
    for (int64_t first = 0; first < runs; first += at_once_) {
      const int64_t last = std::min(first + at_once_, runs);
      parallel(last - first, [&](int64_t task, int) {
        auto next = std::upper_bound(works.begin(), works.end(), first + task,
                                     [](int64_t value, const Work& work) { return value < work.before; });
        const Work& work = *--next;
        attend(work.unit, *work.piece, work.first_run + first + task - work.before, task);
      });
      parallel(count, [&](int64_t task, int) {
        const Work& work = works[size_t(task)];
        const int64_t end = work.before + work.last_run - work.first_run;
        for (int64_t run = std::max(first, work.before); run < std::min(last, end); ++run) take(work.unit, run - first);
      });
    }
  }

  // Of each unit in the order in which its sums are taken, one unit's after another's.
  void add(const std::vector<Pick>& picks) {
    const int64_t count = int64_t(picks.size());
    for (int64_t first = 0; first < count; first += at_once_) {
      const int64_t here = std::min(at_once_, count - first);
      std::vector<int64_t> begins;
      for (int64_t i = 0; i < here; ++i)
        if (i == 0 || picks[size_t(first + i)].unit != picks[size_t(first + i - 1)].unit) begins.push_back(i);
      begins.push_back(here);
      parallel(here, [&](int64_t i, int) {
        all_.attend(picks[size_t(first + i)], queries_ + i * all_.rows * query_, part(count_ + i));
      });
      parallel(int64_t(begins.size()) - 1, [&](int64_t i, int) {
        for (int64_t place = begins[size_t(i)]; place < begins[size_t(i + 1)]; ++place)
          take(picks[size_t(first + place)].unit, place);
      });
    }
  }

  Part of(int64_t unit) const { return part(unit); }

  void finish(float* out) const {
    parallel(count_, [&](int64_t unit, int) { all_.finish(all_.units[size_t(unit)], part(unit), out); });
  }

 private:
  Part part(int64_t index) const {
    float* base = sums_ + index * all_.rows * (width_ + 2);
    return {base, base + all_.rows * width_, base + all_.rows * (width_ + 1)};
  }

  void attend(int64_t unit, const Piece& piece, int64_t run, int64_t place) {
    all_.attend(all_.units[size_t(unit)], piece, run, queries_ + place * all_.rows * query_, part(count_ + place));
  }

  void take(int64_t unit, int64_t place) {
    merge(part(unit), part(count_ + place), all_.units[size_t(unit)].rows(), width_);
  }

  const Units& all_;
  int64_t query_, width_, count_;
  bool few_;
  int64_t at_once_ = 0;
  float *queries_, *sums_;
};

}  // namespace coldstream
