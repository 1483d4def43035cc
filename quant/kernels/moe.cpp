#include <algorithm>
#include <cmath>

#include "mlp.h"
#include "moe.h"

namespace coldstream {
namespace {

// The largest logits first; among equals the lowest index. A NaN is never larger, so the choice stays in range.
void choose(const MoeBlock& block, const float* logits, int32_t* chosen, float* weights) {
  for (int k = 0; k < block.top_k; ++k) {
    int best = -1;
    for (int e = 0; e < block.experts; ++e) {
      if (std::find(chosen, chosen + k, e) != chosen + k) continue;
      if (best < 0 || logits[e] > logits[best]) best = e;
    }
    chosen[k] = best;
  }
  if (block.router_kind == kSigmoidInput) {
    for (int k = 0; k < block.top_k; ++k) weights[k] = 1.0f / (1.0f + std::exp(-logits[chosen[k]]));
    return;
  }
  float total = 0, kept = 0;
  for (int e = 0; e < block.experts; ++e) total += std::exp(logits[e] - logits[chosen[0]]);
  for (int k = 0; k < block.top_k; ++k) kept += weights[k] = std::exp(logits[chosen[k]] - logits[chosen[0]]);
  const float divisor = block.router_kind == kSoftmaxNormalized ? kept : total;
  for (int k = 0; k < block.top_k; ++k) weights[k] /= divisor;
}

void route(const MoeBlock& block, const float* x, int64_t ldx, int64_t tokens, const Routing& routing) {
  const int64_t hidden = block.router.k;
  const Kernels& table = kernels();
  auto norm = [&](int64_t t, int) {
    float* to = routing.normed + t * hidden;
    if (block.norm) table.rms_norm(x + t * ldx, block.norm, hidden, block.eps, to);
    else std::memcpy(to, x + t * ldx, size_t(hidden) * 4);
  };
  if (tokens < 8)
    for (int64_t t = 0; t < tokens; ++t) norm(t, 0);
  else
    parallel(tokens, norm);
  Scratch scratch;
  Product product{block.router, routing.normed, hidden, tokens, routing.logits, block.experts, {}};
  multiply(&product, 1, true, scratch);
  for (int64_t t = 0; t < tokens; ++t)
    choose(block, routing.logits + t * block.experts, routing.chosen + t * block.top_k,
           routing.weights + t * block.top_k);
}

bool resident(const MoeBlock& block, const int32_t* chosen, int64_t count) {
  return std::all_of(chosen, chosen + count, [&](int32_t expert) { return block.table[expert].gate != 0; });
}

Weight at(Weight weight, int64_t packed, int64_t scale) {
  weight.packed = reinterpret_cast<const uint8_t*>(packed);
  weight.scale = reinterpret_cast<const uint16_t*>(scale);
  return weight;
}

void compute(const MoeBlock& block, const float* x, int64_t ldx, int64_t tokens, const Routing& routing, float* out,
             int64_t ldout, bool exact) {
  const int64_t hidden = block.router.k;
  std::vector<std::vector<int32_t>> owned_tokens(size_t(block.experts));
  std::vector<std::vector<float>> owned_weights(size_t(block.experts));
  for (int64_t i = 0; i < tokens * block.top_k; ++i) {
    owned_tokens[size_t(routing.chosen[i])].push_back(int32_t(i / block.top_k));
    owned_weights[size_t(routing.chosen[i])].push_back(routing.weights[i]);
  }
  std::vector<Job> jobs;
  std::vector<float> shared_weights;
  if (block.shared) {
    const float* weigh = nullptr;
    if (block.shared_router.k) {
      Scratch scratch;
      shared_weights.resize(size_t(tokens));
      Product product{block.shared_router, routing.normed, hidden, tokens, shared_weights.data(), 1, {}};
      multiply(&product, 1, true, scratch);
      for (float& value : shared_weights) value = 1.0f / (1.0f + std::exp(-value));
      weigh = shared_weights.data();
    }
    jobs.push_back({block.shared_gate, block.shared_up, block.shared_down, nullptr, tokens, nullptr, weigh});
  }
  const bool scales_input = block.router_kind == kSigmoidInput;
  for (size_t e = 0; e < owned_tokens.size(); ++e) {
    if (owned_tokens[e].empty()) continue;
    const ExpertAddresses& a = block.table[e];
    const float* weights = owned_weights[e].data();
    jobs.push_back({at(block.gate, a.gate, a.gate_scale), at(block.up, a.up, a.up_scale),
                    at(block.down, a.down, a.down_scale), owned_tokens[e].data(), int64_t(owned_tokens[e].size()),
                    scales_input ? weights : nullptr, scales_input ? nullptr : weights});
  }
  for (int64_t t = 0; t < tokens; ++t) {
    if (block.norm) std::memcpy(out + t * ldout, x + t * ldx, size_t(hidden) * 4);
    else std::memset(out + t * ldout, 0, size_t(hidden) * 4);
  }
  run_jobs(jobs.data(), int64_t(jobs.size()), routing.normed, hidden, out, ldout, exact);
}

}  // namespace
}  // namespace coldstream

// Route, and if every chosen expert is resident compute the block too and set *complete; otherwise out is left
// alone and the caller fetches what is missing and runs the jobs itself.
COLDSTREAM_API int32_t cs_moe(const coldstream::MoeBlock* block, const float* x, int64_t ldx, int64_t tokens,
                              float* out, int64_t ldout, const coldstream::Routing* routing, int32_t exact,
                              int32_t* complete) {
  using namespace coldstream;
  return guarded([&] {
    route(*block, x, ldx, tokens, *routing);
    *complete = out && resident(*block, routing->chosen, tokens * block->top_k);
    if (*complete) compute(*block, x, ldx, tokens, *routing, out, ldout, exact != 0);
  });
}
