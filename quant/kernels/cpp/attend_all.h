// Attention of a block's query rows over cached keys, whoever made them.
#pragma once
#include "attention.h"
#include "product.h"

namespace coldstream {

struct Step {
  const AttentionBlock& block;
  const KvPool& pool;
  const KvSegment* segments;
  int64_t count, tokens;       // segments, and rows of all of them
  const float *cosine, *sine;  // [T, rope_dim / 2]
  float *q, *k, *v;            // [T, heads * key_width()] and [T, kv_heads * head_dim]
  bool exact;
};

// softmax(q kᵀ) v into `out` [T, heads * value_width()], wherever pages are. Throws NoPages.
void attend_all(const Step& step, float* out, Scratch& scratch);

// The same without pages that `pool.bounds` lets it leave out, of rows that see everything.
void attend_bounded(const Step& step, float* out, Scratch& scratch);

// Of full pages, for `pool.bounds`.
void find_key_ranges(const KvPool& pool, int64_t kv_heads, int64_t head_dim, const int32_t* pages, int64_t count);

void add_bias(float* rows, const float* bias, int64_t tokens, int64_t width);  // null for none

void rotate(float* head, const float* cosine, const float* sine, int rope, int width);

// One head of a token's keys or values, into `row`, counted over all pages and heads.
void store_head(const KvPool& pool, bool values, int64_t row, const float* from, int64_t width);

// As attention with compressed keys and values does it, of rows after the norm, into `out` [T, o.k].
void attend_compressed(const Step& step, const float* input, int64_t ldinput, float* out, Scratch& scratch);

}  // namespace coldstream
