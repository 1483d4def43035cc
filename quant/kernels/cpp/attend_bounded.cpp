// Attention of a few rows that leaves out pages which cannot matter.
#include <algorithm>
#include <memory>

#include "attend_sums.h"
#include "page_choice.h"

namespace coldstream {
namespace {

// See PageChoice. Each token is by itself, so that what it gets depends neither on those beside it nor on where pages are.
// What is recent is read first.
class BoundedAttention {
 public:
  BoundedAttention(const Step& step, Scratch& scratch)
      : step_(step),
        bounds_(*step.pool.bounds),
        all_(step, 1),
        sums_(all_, step.block.key_width(), step.block.value_width(), scratch, true) {
    const int64_t units = int64_t(all_.units.size());
    for (int64_t i = 0; i < step.count; ++i) find_ranges(i);
    choices_.resize(size_t(units));
    parallel(units, [&](int64_t u, int) {
      const Unit& unit = all_.units[size_t(u)];
      const std::vector<const uint16_t*>& pages = ranges_[size_t(unit.segment)];
      std::vector<const uint16_t*> its(pages.begin(), pages.begin() + recent(all_.position(unit)));
      for (const uint16_t*& range : its) range += unit.kv_head * 2 * range_width(step.block.head_dim);
      std::vector<float> q(size_t(unit.rows() * step.block.head_dim));
      all_.queries(unit, q.data());
      const bool rounded = !step.exact && step.pool.storage == kCacheBf16;
      choices_[size_t(u)] = std::make_unique<PageChoice>(q.data(), unit.rows(), step.block.head_dim, rounded, its);
    });
  }

  void run(float* out) {
    const int64_t units = int64_t(all_.units.size());
    std::vector<std::vector<int64_t>> chosen(static_cast<size_t>(units));
    for (int64_t u = 0; u < units; ++u) {
      const int64_t last = all_.position(all_.units[size_t(u)]);
      for (int64_t block = recent(last); block <= last / kPageTokens; ++block) chosen[size_t(u)].push_back(block);
      bounds_.seen += last / kPageTokens + 1;
    }
    for (bool more = true; more;) {
      for (int64_t i = 0; i < step_.count; ++i) read_elsewhere(i, chosen);
      read(0, units, INT64_MAX, chosen, nullptr);
      more = false;
      parallel(units, [&](int64_t u, int) {
        const Part sum = sums_.of(u);
        chosen[size_t(u)] = choices_[size_t(u)]->next(sum.top, sum.total, bounds_.epsilon);
      });
      for (const std::vector<int64_t>& pages : chosen) more |= !pages.empty();
    }
    for (int64_t u = 0; u < units; ++u) {
      const Part sum = sums_.of(u);
      bounds_.left_out += choices_[size_t(u)]->left();
      bounds_.share = std::max(bounds_.share, choices_[size_t(u)]->share(sum.top, sum.total));
    }
    sums_.finish(out);
  }

 private:
  // The first page of the recent ones, which are not bounded: a run and what has been begun of the next.
  static int64_t recent(int64_t position) { return std::max<int64_t>(0, position / kRunTokens - 1) * kRunPages; }

  void find_ranges(int64_t segment) {
    const KvSegment& of = step_.segments[segment];
    const int64_t heads = step_.block.kv_heads, size = heads * 2 * range_width(step_.block.head_dim);
    std::vector<const uint16_t*> ranges(size_t(recent(of.position + of.tokens - 1)));
    std::vector<int32_t> unknown;
    for (int64_t block = 0; block < int64_t(ranges.size()); ++block) {
      const int32_t page = of.pages[block];
      if (page == kElsewhere) {
        const uint16_t* found = nullptr;
        const int64_t count = bounds_.elsewhere ? bounds_.elsewhere(of.pages, block, &found) : 0;
        if (count <= 0) throw NoPages();
        const int64_t here = std::min(count, int64_t(ranges.size()) - block);
        for (int64_t i = 0; i < here; ++i) ranges[size_t(block + i)] = found + i * size;
        block += count - 1;
        continue;
      }
      ranges[size_t(block)] = bounds_.ranges + page * size;
      if (!bounds_.known[page]) unknown.push_back(page);
    }
    find_key_ranges(step_.pool, heads, step_.block.head_dim, unknown.data(), int64_t(unknown.size()));
    ranges_.push_back(std::move(ranges));
  }

  // What is chosen of a segment and is elsewhere.
  void read_elsewhere(int64_t segment, std::vector<std::vector<int64_t>>& chosen) {
    const int32_t* table = step_.segments[segment].pages;
    const int64_t first = all_.first_of[size_t(segment)], last = all_.first_of[size_t(segment) + 1];
    std::vector<int64_t> wanted;
    for (int64_t u = first; u < last; ++u)
      for (int64_t block : chosen[size_t(u)])
        if (table[block] == kElsewhere) wanted.push_back(block);
    if (wanted.empty()) return;
    std::sort(wanted.begin(), wanted.end());
    wanted.erase(std::unique(wanted.begin(), wanted.end()), wanted.end());
    if (bounds_.need) bounds_.need(table, wanted.data(), int64_t(wanted.size()));
    const KvSegment& of = step_.segments[segment];
    std::vector<int32_t> pages(size_t((of.position + of.tokens) / kPageTokens + 1));
    for (size_t i = 0; i < wanted.size();) {
      const int64_t block = wanted[i];
      const int64_t count = step_.pool.bring ? step_.pool.bring(table, block, pages.data() + block) : 0;
      if (count <= 0) throw NoPages();
      read(first, last, block + count, chosen, pages.data());
      while (i < wanted.size() && wanted[i] < block + count) ++i;
    }
  }

  // Add what is chosen of blocks before `end` to the sums of some units, and take it from what is chosen. `pages` say where
  // they are, or null: their tables do.
  void read(int64_t first, int64_t last, int64_t end, std::vector<std::vector<int64_t>>& chosen,
            const int32_t* pages) {
    std::vector<std::vector<int32_t>> tables(size_t(last - first));
    std::vector<Pick> picks;
    for (int64_t u = first; u < last; ++u) {
      const Unit& unit = all_.units[size_t(u)];
      const int32_t* from = pages ? pages : step_.segments[unit.segment].pages;
      std::vector<int64_t>& blocks = chosen[size_t(u)];
      std::vector<int32_t>& table = tables[size_t(u - first)];
      int64_t count = 0;
      while (count < int64_t(blocks.size()) && blocks[size_t(count)] < end) ++count;
      for (int64_t i = 0; i < count; ++i) table.push_back(from[blocks[size_t(i)]]);
      const int64_t position = all_.position(unit);
      for (int64_t i = 0, next; i < count; i = next) {
        for (next = i + 1; next < count && blocks[size_t(next)] / kRunPages == blocks[size_t(i)] / kRunPages;) ++next;
        const int64_t of_last = std::min<int64_t>(kPageTokens, position + 1 - kPageTokens * blocks[size_t(next - 1)]);
        const int64_t keys = (next - 1 - i) * kPageTokens + of_last;
        picks.push_back({u, table.data() + i, keys, (count - i) * kPageTokens});
      }
      blocks.erase(blocks.begin(), blocks.begin() + count);
    }
    sums_.add(picks);
  }

  const Step& step_;
  KeyBounds& bounds_;
  Units all_;
  Sums sums_;
  std::vector<std::vector<const uint16_t*>> ranges_;  // of each segment's pages
  std::vector<std::unique_ptr<PageChoice>> choices_;  // of each unit
};

}  // namespace

void find_key_ranges(const KvPool& pool, int64_t kv_heads, int64_t head_dim, const int32_t* pages, int64_t count) {
  const int64_t size = 2 * range_width(head_dim);
  parallel(count * kv_heads, [&](int64_t task, int) {
    const int64_t head = pages[task / kv_heads] * kv_heads + task % kv_heads;
    kernels().find_ranges(pool, head, head_dim, pool.bounds->ranges + head * size);
  });
  for (int64_t i = 0; i < count; ++i) pool.bounds->known[pages[i]] = 1;
}

void attend_bounded(const Step& step, float* out, Scratch& scratch) { BoundedAttention(step, scratch).run(out); }

}  // namespace coldstream

// The ranges of the keys of `count` full pages of a pool that has bounds.
COLDSTREAM_API int32_t cs_find_key_ranges(const coldstream::KvPool* pool, int64_t kv_heads, int64_t head_dim,
                                          const int32_t* pages, int64_t count) {
  using namespace coldstream;
  return guarded([&] { find_key_ranges(*pool, kv_heads, head_dim, pages, count); });
}
