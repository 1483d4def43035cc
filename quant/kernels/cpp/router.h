// How a router's logits choose experts and weigh them: one form for all families, in numbers that Python fills.
#pragma once
#include <cstdint>
#include <vector>

namespace coldstream {

enum Router : int32_t {
  kSigmoidInput = 0,  // of the chosen experts alone, and multiplies their input
  kSoftmax = 1,
  kSoftmaxNormalized = 2,
  kSigmoid = 3,
  kSigmoidNormalized = 4
};

// Experts are chosen by their score, to which `correction` is added for that; weights are scores without it. With
// groups (of neighbours, all of one size) only experts of the best groups are chosen: a group is as good as the sum of
// its `group_best` best.
struct Selection {
  int32_t kind;  // Router
  int32_t groups, groups_kept, group_best;
  float scale, floor;  // what weights are multiplied by; normalized ones are divided by their sum, or by `floor` if larger

  bool scales_input() const { return kind == kSigmoidInput; }
  bool is_sigmoid() const { return kind == kSigmoid || kind == kSigmoidNormalized; }
  bool is_normalized() const { return kind == kSoftmaxNormalized || kind == kSigmoidNormalized; }
  bool is_grouped() const { return groups > 1 && groups_kept < groups; }
  // Whether the largest logits are chosen, whatever one positive factor on all of them.
  bool by_logits(const float* correction) const {
    return kind == kSigmoidInput || (!correction && !(is_grouped() && group_best > 1));
  }
};

// What one token's experts are chosen by, [experts]: -infinity in groups that are not kept.
void choice_scores(const Selection& selection, const float* correction, const float* logits, int experts,
                   std::vector<float>& scores);

// The `top_k` experts of one token, best first, among equals the lowest index, and their weights. A NaN is never larger,
// so what is chosen exists.
void choose(const Selection& selection, const float* correction, const float* logits, int experts, int top_k,
            int32_t* chosen, float* weights);

}  // namespace coldstream
