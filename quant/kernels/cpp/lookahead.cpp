#include "lookahead.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "product.h"

namespace coldstream {
namespace {

float deviation(const float* values, int count) {
  double mean = 0, squares = 0;
  for (int i = 0; i < count; ++i) mean += values[i];
  mean /= count;
  for (int i = 0; i < count; ++i) squares += (values[i] - mean) * (values[i] - mean);
  return float(std::sqrt(squares / count));
}

// Where the largest logits are chosen and they have no bias, a token's norm is one positive factor on all of a layer's,
// and does not matter.
void finish_logits(const Lookahead& f, int32_t here, const float* x, int64_t rows, int64_t width, float* logits) {
  const float* bias = f.bias ? f.bias + int64_t(here + 1) * f.experts : nullptr;
  for (int64_t row = 0; row < rows; ++row) {
    double squares = 0;
    for (int64_t i = 0; i < f.routers.k; ++i) squares += double(x[row * f.routers.k + i]) * x[row * f.routers.k + i];
    const float factor = float(1 / std::sqrt(squares / double(f.routers.k) + 1e-20));
    for (int64_t i = 0; i < width; ++i)
      logits[row * width + i] = logits[row * width + i] * factor + (bias ? bias[i] : 0.0f);
  }
}

}  // namespace

void guess(const Lookahead& f, GuessKind kind, int32_t here, const float* x, int64_t rows,
           std::vector<Expected>& expected) {
  const int reach = std::min(f.layers - 1 - here, f.depth);
  if (reach <= 0) return;
  const int64_t width = int64_t(reach) * f.experts;
  std::vector<float> logits(size_t(rows * width));
  {
    Scratch scratch;
    Weight ahead = f.routers;
    ahead.packed += int64_t(here + 1) * f.experts * ahead.row_bytes();
    ahead.n = width;
    Product product{ahead, x, ahead.k, rows, logits.data(), ahead.n, {}};
    multiply(&product, 1, true, scratch);
  }
  const bool by_logits = f.selection.by_logits(f.correction) && !f.selection.is_grouped();
  if (f.bias || !by_logits) finish_logits(f, here, x, rows, width, logits.data());
  const int next = std::min(f.top_k, f.experts - 1);  // the best that is not chosen; with all chosen the last one is
  std::vector<int32_t> order(static_cast<size_t>(f.experts));
  std::vector<float> scores;
  for (int distance = 0; distance < reach; ++distance) {
    const int32_t index = here + 1 + distance;
    const size_t first = expected.size();
    for (int64_t row = 0; row < rows; ++row) {
      const float* found = logits.data() + row * width + int64_t(distance) * f.experts;
      const float spread = deviation(found, f.experts);
      if (!by_logits) {
        const float* correction = f.correction ? f.correction + int64_t(index) * f.experts : nullptr;
        choice_scores(f.selection, correction, found, f.experts, scores);
        found = scores.data();
      }
      std::iota(order.begin(), order.end(), 0);
      std::partial_sort(order.begin(), order.begin() + next + 1, order.end(), [&](int32_t a, int32_t b) {
        return found[a] > found[b] || (found[a] == found[b] && a < b);
      });
      const float margin = (found[order[size_t(f.top_k - 1)]] - found[order[size_t(next)]]) / std::max(spread, 1e-20f);
      const int bin = int(std::count_if(f.edges, f.edges + f.bins - 1, [&](float edge) { return margin > edge; }));
      const int32_t record = (kind * f.depth + distance) * f.bins + bin;
      if (f.counts[index] < f.slots) {
        int32_t* kept = f.guesses + (int64_t(index) * f.slots + f.counts[index]++) * (2 + f.top_k);
        kept[0] = record;
        kept[1] = int32_t(row);
        std::copy_n(order.begin(), f.top_k, kept + 2);
      }
      if (f.right[record] < f.trust) continue;
      for (int k = 0; k < f.top_k; ++k) {
        const int32_t expert = order[size_t(k)];
        const bool known = std::any_of(expected.begin() + int64_t(first), expected.end(),
                                       [&](const Expected& e) { return e.expert == expert; });
        if (!known) expected.push_back({index, expert});
      }
    }
  }
}

void learn(const Lookahead& f, int32_t index, const int32_t* chosen, int64_t rows) {
  for (int i = 0; i < f.counts[index]; ++i) {
    const int32_t* kept = f.guesses + (int64_t(index) * f.slots + i) * (2 + f.top_k);
    if (kept[1] >= rows) continue;  // a sequence that has left since
    const int32_t* its = chosen + int64_t(kept[1]) * f.top_k;
    int hits = 0;
    for (int k = 0; k < f.top_k; ++k) hits += std::find(its, its + f.top_k, kept[2 + k]) != its + f.top_k;
    float& right = f.right[kept[0]];
    right = f.memory * right + (1 - f.memory) * float(hits) / float(f.top_k);
  }
  f.counts[index] = 0;
}

}  // namespace coldstream

// What `guess` finds for MoE layer `here`: [layer index, expert] pairs in `pairs` (room for D * k), *count of them.
COLDSTREAM_API int32_t cs_guess(const coldstream::Lookahead* lookahead, int32_t kind, int32_t here, const float* x,
                                int32_t* pairs, int32_t* count) {
  using namespace coldstream;
  return guarded([&] {
    std::vector<Expected> expected;
    guess(*lookahead, GuessKind(kind), here, x, 1, expected);
    for (const Expected& e : expected) {
      *pairs++ = e.index;
      *pairs++ = e.expert;
    }
    *count = int32_t(expected.size());
  });
}

COLDSTREAM_API void cs_learn(const coldstream::Lookahead* lookahead, int32_t index, const int32_t* chosen) {
  coldstream::learn(*lookahead, index, chosen, 1);
}
