// What one attention block is: the struct that Python fills.
#pragma once
#include "kernels.h"

namespace coldstream {

enum Rope : int32_t { kNoRope = 0, kInterleaved = 1, kHalves = 2 };
enum QkNorm : int32_t { kNoQkNorm = 0, kPerHead = 1, kFullWidth = 2 };

struct AttentionBlock {
  const float* norm;  // RMSNorm before the block, f32 [H], and a residual around both; null for neither
  float eps;
  int32_t heads, kv_heads, head_dim;
  int32_t rope, rope_dim;  // the first rope_dim channels of a head are rotated
  int32_t qk_norm;         // RMSNorm of q and k before RoPE
  int32_t l2_norm;         // weightless RMSNorm per head after RoPE (Llama 4)
  const float *q_norm, *k_norm;
  float qk_eps, scaling;
  float temperature_floor, temperature_scale;  // q *= log1p(floor((position + 1) / floor)) * scale + 1; floor 0: off
  int64_t chunk, window;                       // 0: off
  Weight q, k, v, o;
  const float *q_bias, *k_bias, *v_bias, *o_bias;  // f32 or null
};

}  // namespace coldstream
