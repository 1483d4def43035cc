#include "router.h"

#include <algorithm>
#include <cmath>

namespace coldstream {
namespace {

float sigmoid(float value) { return 1.0f / (1.0f + std::exp(-value)); }

// The largest first; among equals the lowest index.
template <class Index>
void best(const float* values, int count, int wanted, Index* found) {
  std::vector<char> taken(static_cast<size_t>(count));
  for (int k = 0; k < wanted; ++k) {
    int top = -1;
    for (int i = 0; i < count; ++i)
      if (!taken[size_t(i)] && (top < 0 || values[i] > values[top])) top = i;
    taken[size_t(top)] = 1;
    found[k] = Index(top);
  }
}

void keep_best_groups(const Selection& s, std::vector<float>& scores) {
  const int groups = s.groups, size = int(scores.size()) / groups, count = std::min<int>(s.group_best, size);
  std::vector<float> goodness(static_cast<size_t>(groups));
  std::vector<int> places(static_cast<size_t>(std::max(count, groups)));
  for (int g = 0; g < groups; ++g) {
    best(scores.data() + g * size, size, count, places.data());
    for (int i = 0; i < count; ++i) goodness[size_t(g)] += scores[size_t(g * size + places[size_t(i)])];
  }
  best(goodness.data(), groups, groups, places.data());
  for (int i = s.groups_kept; i < groups; ++i)
    std::fill_n(scores.begin() + places[size_t(i)] * size, size, -INFINITY);
}

}  // namespace

void choice_scores(const Selection& s, const float* correction, const float* logits, int experts,
                   std::vector<float>& scores) {
  scores.assign(logits, logits + experts);
  if (s.is_sigmoid()) {
    for (float& score : scores) score = sigmoid(score);
  } else if (!s.by_logits(correction)) {
    const float top = *std::max_element(scores.begin(), scores.end());
    float total = 0;
    for (float& score : scores) total += score = std::exp(score - top);
    for (float& score : scores) score /= total;
  }
  for (int e = 0; correction && e < experts; ++e) scores[size_t(e)] += correction[e];
  if (s.is_grouped()) keep_best_groups(s, scores);
}

void choose(const Selection& s, const float* correction, const float* logits, int experts, int top_k, int32_t* chosen,
            float* weights) {
  std::vector<float> scores;
  choice_scores(s, correction, logits, experts, scores);
  best(scores.data(), experts, top_k, chosen);
  float total = 0, kept = 0;
  if (s.kind == kSigmoidInput || s.is_sigmoid()) {
    for (int k = 0; k < top_k; ++k) kept += weights[k] = sigmoid(logits[chosen[k]]);
    total = 1;
  } else {
    const float top = correction || s.is_grouped() ? *std::max_element(logits, logits + experts) : logits[chosen[0]];
    for (int e = 0; e < experts; ++e) total += std::exp(logits[e] - top);
    for (int k = 0; k < top_k; ++k) kept += weights[k] = std::exp(logits[chosen[k]] - top);
    if (s.is_normalized() && s.floor > 0) kept = std::max(kept, s.floor * total);
  }
  const float divisor = s.is_normalized() ? kept : total;
  for (int k = 0; k < top_k; ++k) weights[k] = weights[k] / divisor * s.scale;
}

}  // namespace coldstream
