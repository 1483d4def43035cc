// What one attention block is, the structs that Python fills, and the block itself.
#pragma once
#include "kernels.h"

namespace coldstream {

enum Rope : int32_t { kNoRope = 0, kInterleaved = 1, kHalves = 2 };
enum QkNorm : int32_t { kNoQkNorm = 0, kPerHead = 1, kFullWidth = 2, kPerHeadAfterRope = 3 };

struct AttentionBlock {
  const float* norm;  // RMSNorm before the block, f32 [H], and a residual around both; null for neither
  float eps;
  int32_t heads, kv_heads, head_dim;  // head_dim of a row in pages
  int32_t rope, rope_dim;  // the first rope_dim channels of a head are rotated
  int32_t qk_norm;         // RMSNorm of q and k, before RoPE unless it says after
  int32_t l2_norm;         // weightless RMSNorm per head after RoPE (Llama 4)
  const float *q_norm, *k_norm;
  float qk_eps, scaling;
  float temperature_floor, temperature_scale;  // q *= log1p(floor((position + 1) / floor)) * scale + 1; floor 0: off
  int64_t chunk, window;                       // 0: off
  Weight q, k, v, o;
  const float *q_bias, *k_bias, *v_bias, *o_bias;  // f32 or null
  const float* sinks;  // [heads] or null: a score that takes part in the softmax and has no value (gpt-oss)
  // Compressed keys and values (MLA), 0 for none: of a token a latent of so many channels is kept, after it the channels
  // that RoPE has rotated, for all heads together; one half of them lies in the keys' pages, the other in the values'.
  // Then `k` makes both, normed by k_norm as far as the latent goes; `v` [heads * (nope + value_dim), latent] makes of a
  // latent each head's keys, as far as they are not rotated, and values.
  int32_t latent, nope, value_dim;
  Weight q_down;  // [rank, H], what `q` takes in then, normed by q_norm; k = 0 for none. q_bias is its bias then

  int64_t key_width() const { return latent ? 2 * head_dim : head_dim; }
  int64_t value_width() const { return latent ? latent : head_dim; }
};

// New tokens of one sequence, at `position` and after: some rows of what a block computes. `pages` is the sequence's
// table for the block's layer.
struct KvSegment {
  const int32_t* pages;
  int64_t position, tokens;
};

// x + o(attention(norm(x))) of the rows of all segments, whose keys and values are appended to the pages. A row's
// result does not depend on the rows beside it: the tests hold that to the bit.
void attend_segments(const AttentionBlock& block, const float* x, int64_t ldx, const KvSegment* segments,
                     int64_t count, const float* cosine, const float* sine, const KvPool& pool, float* out,
                     int64_t ldout, bool exact);

}  // namespace coldstream
