// What one MoE block is and what routing finds: the structs that Python fills.
#pragma once
#include "kernels.h"

namespace coldstream {

enum Router : int32_t { kSigmoidInput = 0, kSoftmax = 1, kSoftmaxNormalized = 2 };

// Addresses of one expert's three weights; a gate of 0 says that it is not resident.
struct ExpertAddresses {
  int64_t gate, gate_scale, up, up_scale, down, down_scale;
};

struct MoeBlock {
  const float* norm;  // RMSNorm before the block, f32 [H], and a residual around both; null for neither
  float eps;
  int32_t router_kind, experts, top_k;
  Weight router;
  Weight gate, up, down;  // what all routed experts share: kind, group and shape; addresses come from the table
  const ExpertAddresses* table;  // [experts]
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

}  // namespace coldstream
