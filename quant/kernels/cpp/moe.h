// What one MoE block is and what routing finds: the structs that Python fills.
#pragma once
#include <vector>

#include "kernels.h"
#include "router.h"

namespace coldstream {

enum ExpertState : int64_t { kAbsent = 0, kReady = 1, kComing = 2, kFailed = 3 };

// One expert: the addresses of its three weights and of their biases (0: none), how each weight is packed (kind |
// group << 32) and in what the biases are, and whether the bytes are there. Whoever brings them writes everything else
// first and the state last, by `publish`.
struct ExpertEntry {
  int64_t gate, gate_scale, up, up_scale, down, down_scale;
  int64_t gate_bias, up_bias, down_bias;
  int64_t gate_form, up_form, down_form, bias_kind;
  int64_t state;
};

struct MoeBlock {
  const float* norm;  // RMSNorm before the block, f32 [H], and a residual around both; null for neither
  float eps;
  int32_t experts, top_k;
  Selection selection;
  Weight router;
  const float *router_bias, *correction;  // [experts] or null: of the logits; of what is chosen by
  Weight gate, up, down;  // the shapes that all routed experts share; the rest comes from the table
  ExpertEntry* table;     // [experts]
  float alpha, limit, offset;    // what gate and up of a routed expert are joined by: see run_jobs
  int32_t shared;                // 1 if there is a shared expert
  Weight shared_gate, shared_up, shared_down;
  Weight shared_router;  // [1, H]: a sigmoid that weighs the shared expert's output; k = 0 for none
};

struct Routing {
  float* normed;     // [T, H]: the block's input after the norm (x itself without one)
  float* logits;     // [T, E]
  int32_t* chosen;   // [T, top_k]
  float* weights;    // [T, top_k]
};

// Norm and router: fills `routing` for `tokens` rows of x.
void route(const MoeBlock& block, const float* x, int64_t ldx, int64_t tokens, const Routing& routing);

// The whole block for rows that have been routed, all chosen experts ready.
void compute_block(const MoeBlock& block, const float* x, int64_t ldx, int64_t tokens, const Routing& routing,
                   float* out, int64_t ldout, bool exact);

// In parts, the same to the bit: out = x (0 without a norm) + the shared expert; what each of `experts` gives the rows
// that chose it, into `parts` [T * top_k, H], in any order; and all of that added to out, by index of the expert.
void compute_shared(const MoeBlock& block, const float* x, int64_t tokens, const Routing& routing, float* out,
                    bool exact);
void compute_routed(const MoeBlock& block, int64_t tokens, const Routing& routing, const std::vector<int32_t>& experts,
                    float* parts, bool exact);
void add_routed(const MoeBlock& block, int64_t tokens, const Routing& routing, const float* parts, float* out);

ExpertState state_of(const MoeBlock& block, int32_t expert);

// Wait until one of `experts` is no longer coming, `seconds` at most; returns whether one is.
bool await_experts(const MoeBlock& block, const std::vector<int32_t>& experts, double seconds);

}  // namespace coldstream
