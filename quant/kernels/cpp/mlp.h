// Gated feed-forward blocks: down(silu(gate(x)) * up(x)), many experts in one call.
#pragma once
#include <limits>

#include "product.h"

namespace coldstream {

// One expert and the tokens it works for.
struct Job {
  Weight gate, up, down;
  const int32_t* tokens;    // rows of x and out; null: rows 0 to count
  int64_t count;
  const float* in_scale;    // [count] or null: scales the expert's input, as Llama 4's router does
  const float* out_weight;  // [count] or null: scales its output, as every other router does
  const int32_t* out_rows;  // rows of out; null: as `tokens`
  const void *gate_bias = nullptr, *up_bias = nullptr, *down_bias = nullptr;  // [I], [I], [H], or null
  int32_t bias_kind = kF32;  // or kBf16
  float alpha = 1, limit = std::numeric_limits<float>::infinity(), offset = 0;  // what gate and up are joined by: see run_jobs

  bool is_silu() const { return !gate_bias && !up_bias && alpha == 1 && offset == 0 && !(limit < 1e30f); }
};

// out[t] += out_weight * down(silu(gate(in_scale * x[t])) * up(in_scale * x[t])) for every job; with numbers of its own
// g * sigmoid(alpha * g) * (u + offset), g and u clamped to limit before. Must be called
// with no Scratch alive on this thread.
void run_jobs(const Job* jobs, int64_t count, const float* x, int64_t ldx, float* out, int64_t ldout, bool exact);

}  // namespace coldstream
