// Attention over compressed keys and values (MLA), as DeepSeek-V2 describes it: what makes a head's keys of a latent is
// multiplied into its query instead, and what makes its values into its output, so that latents are never expanded.
#include <cstring>
#include <vector>

#include "attend_all.h"

namespace coldstream {
namespace {

Weight rows_of(Weight weight, int64_t first, int64_t count) {
  weight.packed += first * weight.stride();
  if (weight.is_packed()) weight.scale += first * weight.scale_stride();
  weight.n = count;
  return weight;
}

void multiply_all(Product* products, int count, bool exact, Scratch& scratch) {
  if (!exact) quantize_inputs(products, count, scratch);
  multiply(products, count, exact, scratch);
}

void norm_rows(float* rows, const float* weight, int64_t tokens, int64_t width, int64_t ld, float eps) {
  for (int64_t t = 0; t < tokens; ++t) kernels().rms_norm(rows + t * ld, weight, width, eps, rows + t * ld);
}

// Each token's latent and rotated channels: norm, RoPE, and into the pages.
void keep(const Step& step, float* kept) {
  const AttentionBlock& b = step.block;
  const int64_t width = b.key_width(), half = b.head_dim;
  norm_rows(kept, b.k_norm, step.tokens, b.latent, width, b.qk_eps);
  int64_t t = 0;
  for (int64_t i = 0; i < step.count; ++i) {
    const KvSegment& segment = step.segments[i];
    for (int64_t token = 0; token < segment.tokens; ++token, ++t) {
      const int64_t position = segment.position + token, angle = t * (b.rope_dim / 2);
      float* from = kept + t * width;
      rotate(from + b.latent, step.cosine + angle, step.sine + angle, b.rope, b.rope_dim);
      const int64_t row = segment.pages[position / kPageTokens] * int64_t(kPageTokens) + position % kPageTokens;
      store_head(step.pool, false, row, from, half);
      store_head(step.pool, true, row, from + half, half);
    }
  }
}

}  // namespace

void attend_compressed(const Step& given, const float* input, int64_t ldinput, float* out, Scratch& scratch) {
  const AttentionBlock& b = given.block;
  const int64_t tokens = given.tokens, heads = b.heads, width = b.key_width(), per_head = b.nope + b.rope_dim;
  const int64_t q_width = heads * per_head, rank = b.q_down.n;
  Step step = given;
  step.q = scratch.take<float>(tokens * heads * width);
  float *q = scratch.take<float>(tokens * q_width), *kept = scratch.take<float>(tokens * width);
  float* down = b.q_down.k ? scratch.take<float>(tokens * rank) : q;
  Product first[] = {{b.q_down.k ? b.q_down : b.q, input, ldinput, tokens, down, b.q_down.k ? rank : q_width, {}},
                     {b.k, input, ldinput, tokens, kept, width, {}}};
  multiply_all(first, 2, step.exact, scratch);
  add_bias(down, b.q_bias, tokens, b.q_down.k ? rank : q_width);
  add_bias(kept, b.k_bias, tokens, width);
  if (b.q_down.k) {
    norm_rows(down, b.q_norm, tokens, rank, rank, b.qk_eps);
    Product next{b.q, down, rank, tokens, q, q_width, {}};
    multiply_all(&next, 1, step.exact, scratch);
  }
  keep(step, kept);
  const int64_t both = b.nope + b.value_dim;
  const auto turned = step.exact ? kernels().dense_turned : kernels().turned;
  parallel(heads, [&](int64_t h, int) {
    for (int64_t t = 0; t < tokens; ++t) {
      float *from = q + t * q_width + h * per_head, *to = step.q + (t * heads + h) * width;
      const int64_t angle = t * (b.rope_dim / 2);
      rotate(from + b.nope, step.cosine + angle, step.sine + angle, b.rope, b.rope_dim);
      for (int64_t i = 0; i < per_head; ++i) from[i] *= b.scaling;
      std::memcpy(to + b.latent, from + b.nope, size_t(b.rope_dim) * 4);
    }
    turned(b.v, h * both, h * both + b.nope, q + h * per_head, q_width, int(tokens), step.q + h * width, heads * width);
  });
  float* context = scratch.take<float>(tokens * heads * b.latent);
  attend_all(step, context, scratch);
  std::vector<Product> expanded;
  for (int64_t h = 0; h < heads; ++h)
    expanded.push_back({rows_of(b.v, h * both + b.nope, b.value_dim), context + h * b.latent, heads * b.latent, tokens,
                        out + h * b.value_dim, heads * b.value_dim, {}});
  multiply_all(expanded.data(), int(heads), step.exact, scratch);
}

}  // namespace coldstream
