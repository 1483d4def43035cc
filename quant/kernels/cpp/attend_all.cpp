#include "attend_all.h"

#include <vector>

#include "attend_sums.h"

namespace coldstream {

void attend_all(const Step& step, float* out, Scratch& scratch) {
  const AttentionBlock& b = step.block;
  if (step.pool.bounds && !b.chunk && !b.window && !b.latent) return attend_bounded(step, out, scratch);
  const Units all(step);
  Sums sums(all, step.block.key_width(), step.block.value_width(), scratch);
  std::vector<Piece> rest;
  for (int64_t i = 0; i < step.count; ++i) {
    const KvSegment& segment = step.segments[i];
    const int64_t end = segment.position + segment.tokens;
    int64_t block = all.sees_from(segment.position) / kPageTokens;
    if (step.pool.bring && segment.pages[block] == kElsewhere) {
      std::vector<int32_t> table(segment.pages, segment.pages + (end + kPageTokens - 1) / kPageTokens);
      while (segment.pages[block] == kElsewhere) {
        const int64_t count = step.pool.bring(segment.pages, block, table.data() + block);
        if (count <= 0) throw NoPages();
        sums.add({{table.data(), block / kRunPages, (block + count) / kRunPages, (block + count) * kPageTokens}}, i);
        block += count;
      }
    }
    rest.push_back({segment.pages, block / kRunPages, (end + kRunTokens - 1) / kRunTokens, end});
  }
  sums.add(rest, 0);
  sums.finish(out);
}

}  // namespace coldstream
