// What every instruction set implements, and the plain types that cross the boundary to Python.
//
// Legend: T tokens, N out features, K in features, G groups along K. Row r of a weight is out feature r.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace coldstream {

enum Kind : int32_t { kInt4 = 0, kInt8 = 1, kBf16 = 2, kF32 = 3, kF16 = 4, kInt3 = 5, kInt2 = 6 };
enum SourceType : int32_t { kSourceBf16 = 0, kSourceF16 = 1, kSourceF32 = 2 };

// Status codes of the C functions; Python turns them into one-line errors.
enum Status : int32_t { kOk = 0, kBadArgument = -1, kNoMemory = -2, kUnsupported = -3, kNoPages = -4 };

// A weight where it lies: packed int32 words and bf16 scales, or plain bf16/f16/f32 rows. Nothing is owned. A part of a
// wider weight's columns (whole groups) is a weight whose rows lie `pitch` columns apart.
struct Weight {
  int32_t kind;
  int32_t group;  // weights along K that share a scale; 0 for plain kinds
  int64_t n, k;
  const uint8_t* packed;  // 4-byte aligned
  const uint16_t* scale;  // bf16 [N, G]
  int64_t pitch = 0;      // columns from one row to the next; 0: k

  bool is_packed() const { return kind == kInt4 || kind == kInt8 || kind == kInt3 || kind == kInt2; }
  int64_t groups() const { return k / group; }
  int64_t bytes(int64_t columns) const {
    switch (kind) {
      case kInt2: return columns / 4;
      case kInt3: return columns / 8 * 3;
      case kInt4: return columns / 2;
      case kInt8: return columns;
      case kF32: return columns * 4;
      default: return columns * 2;
    }
  }
  int64_t row_bytes() const { return bytes(k); }
  int64_t stride() const { return bytes(pitch ? pitch : k); }      // bytes from one row to the next
  int64_t scale_stride() const { return (pitch ? pitch : k) / group; }
};

struct QuantizeStats {
  int64_t nonfinite;  // groups that held a NaN or an infinity
  double squared_error, squared_sum;
};

// Float matrix in, packed matrix out. `stride` counts source elements between rows as they lie in memory:
// rows of K when not transposed, rows of N when transposed.
struct QuantizeJob {
  const void* source;
  int32_t source_type, kind, group, transposed;
  int64_t n, k, stride;
  uint32_t* packed;
  uint16_t* scale;
  int32_t search;        // int2 to int4: 0 rounds to nearest by absmax, 1 searches each group's scale
  const int32_t* means;  // [K] in -127..127, what rounding errors are balanced against; or null
};

// Rounding to given scales that makes up for each value's error in others of its block of columns: see
// quant/rounding/curvature.py. `first` and `again` are [blocks, block, block], `order` says which column of its block comes when.
struct FeedbackJob {
  const float* weight;    // [N, K]
  const uint16_t* scale;  // bf16 [N, G]
  int64_t n, k;
  int32_t group, block, low, high;
  const int32_t* order;  // [K]
  const float *first, *again;
  int8_t* values;  // [N, K]
};

enum CodeKind : int32_t { kFloat8 = 0, kQ8_0 = 1, kQ4_K = 2, kQ5_K = 3, kQ6_K = 4 };

inline int64_t code_block_bytes(int32_t kind) {
  return kind == kQ8_0 ? 34 : kind == kQ4_K ? 144 : kind == kQ5_K ? 176 : 210;
}

// Rows of codes as they lie, one after the other, to f32. Those of kFloat8 have a factor for each `width` columns, f32 [rows,
// ceil(columns / width)]; the others are blocks of 32 (kQ8_0) or 256 values in ggml's layout.
struct CodesJob {
  const uint8_t* codes;
  const float* factors;
  float* out;  // [rows, columns]
  int64_t rows, columns, width;
  int32_t kind;
};

// T rows of activations as int8: blocks of 128 along K, for 2 to 4 bits the 64 even elements then the 64 odd
// ones (the order in which masking and shifting 64 packed bytes yields them), in int8 layout as they come. One token for 2
// bits, where vectors have 64 bytes: blocks of 256, elements 4 i, then 4 i + 1, 4 i + 2 and 4 i + 3.
struct Activations {
  const int8_t* q;       // [T, q_stride], zero-padded to a multiple of 128, or of a block
  const float* scale;    // [T, g_stride], zeros past the last group
  const int32_t* sum;    // [T, g_stride]: sum of q over the group; zeros past the last
  int64_t q_stride, g_stride;
};

constexpr int kBlockKeys = 64;

enum CacheStorage : int32_t { kCacheF32 = 0, kCacheBf16 = 1, kCacheInt8 = 2, kCacheInt8Blocks = 3 };

constexpr int kPageTokens = 128;
constexpr int64_t kRunTokens = 512;  // keys of one run: its sums are merged with others' in order, whoever made them

// Keys and values of any layers and sequences in pages [kv_heads, kPageTokens, head_dim], each of one layer and of
// tokens [128 i, 128 i + 128) of one sequence. Which page holds them, a table says: entry i. In kCacheInt8Blocks a head's
// page lies as dot products want it: keys [2][head_dim / 4][64 tokens][4 channels], with 128 added, values [32][head_dim]
// [4 tokens]. That takes a head_dim of whole words.
//
// Where an entry is kElsewhere, `bring` is asked for the page, by the thread that makes the call: it writes the pages of
// that block and of some after it, which stay until it is asked again, and returns how many, or 0 if they cannot be had.
// It gives whole runs of kRunTokens up to where entries are pages again.
constexpr int32_t kElsewhere = -2;
using Bring = int64_t (*)(const int32_t* table, int64_t block, int32_t* pages);

// What a few rows need not read of what they see: pages whose keys cannot have more than a share of `epsilon` of a
// row's softmax, all together. `ranges` bf16 [pages, kv_heads, 2, range_width(head_dim)] are the smallest and the largest key
// of every channel (rounded down and up, zeros after the last) where `known` [pages] says so; they are found once a page
// is full. Of pages that are elsewhere `elsewhere` gives the ranges: of that block and of some after it; how many, it
// returns. `need` is told what will be asked for of a table (ascending) before it is. Counted, of pages and KV heads: how
// many were seen, how many were left out, and the greatest share that these can have had.
using RangesElsewhere = int64_t (*)(const int32_t* table, int64_t block, const uint16_t** ranges);
using Need = void (*)(const int32_t* table, const int64_t* blocks, int64_t count);

struct KeyBounds {
  uint16_t* ranges;
  uint8_t* known;
  double epsilon;
  RangesElsewhere elsewhere;  // null where all pages are in the pool
  Need need;
  int64_t seen, left_out;
  double share;
};

inline int64_t range_width(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }

struct KvPool {
  void *keys, *values;
  float *key_scale, *value_scale;  // int8 only: [pages, kv_heads, kPageTokens]
  int32_t storage;
  Bring bring;        // null where all pages are in the pool
  KeyBounds* bounds;  // null: everything is read
};

constexpr int kAttendRows = 96;  // query rows of one task: enough to make transposing the keys cheap

// Query rows of one KV head against the cached keys [first, last); a row sees only [from, to), and pages hold something
// from their beginnings on. Leaves the unnormalized output, the largest score and the sum of weights, so that several
// runs of keys can be merged.
struct AttendTask {
  const KvPool* pool;
  const int32_t* pages;  // the table of this layer and sequence
  const float* q;        // [rows, key_width], scaled
  const int64_t *from, *to;
  int64_t kv_heads, kv_head, head_dim;
  int64_t key_width, value_width;  // head_dim both; or, compressed, twice that, and what of a key is its value, too
  int64_t first, last;
  int64_t ahead;  // keys up to here are in pages and will be wanted soon
  int rows;
  bool exact;  // f32 throughout; else what is not cached in f32 may be multiplied in bf16
  float *out, *top, *total;  // [rows, value_width], [rows], [rows]

  bool compressed() const { return key_width != head_dim; }
};

// Rows of one KV head, and what bounds their scores: [rows, range_width] each, zeros after the last channel. `slack` is
// by how much the kernels may round a query's channel.
struct BoundedRows {
  const float *positive, *negative, *slack;
  int64_t rows, width;
};

constexpr int64_t kGroupRun = 64;  // groups that a kernel may look at together
constexpr int kGemvTokens = 8;   // more are cheaper through a panel

struct Kernels {
  const char* name;
  int gemv_rows, gemm_rows;  // rows of one block, of one panel
  void (*quantize_rows)(const QuantizeJob&, int64_t row0, int64_t row1, QuantizeStats*);
  void (*quantize_columns)(const QuantizeJob&, int64_t column0, int64_t column1, int64_t group0, int64_t group1,
                           QuantizeStats*);
  void (*round_with_feedback)(const FeedbackJob&, int64_t row0, int64_t row1);
  void (*widen_codes)(const CodesJob&, int64_t row0, int64_t row1);
  // x f32 [K] to one row of Activations, for weights of this kind and group; `alone`: of one row.
  void (*quantize_activations)(const float* x, int64_t k, int32_t kind, int32_t group, bool alone, int8_t* q,
                               float* scale, int32_t* sum);
  // y[t, row] for rows of a packed weight: gemv streams each row once for 1 to kGemvTokens tokens; gemm takes any
  // number of tokens and unpacks gemm_rows rows at a time into `panel`. Both give a row of x the same bits, whatever
  // other rows are in the call.
  void (*gemv)(const Weight&, int64_t row0, int64_t row1, const Activations&, int tokens, float* y, int64_t ldy);
  void (*gemm)(const Weight&, int64_t row0, int64_t row1, const Activations&, int tokens, float* y, int64_t ldy,
               uint8_t* panel);
  // The same product with f32 activations, for every kind: exact up to f32 rounding.
  void (*dense)(const Weight&, int64_t row0, int64_t row1, const float* x, int64_t ldx, int tokens, float* y,
                int64_t ldy);
  // y[t][i] = sum over rows r of x[t][r] w[row0 + r][i]: the weight the other way round.
  void (*dense_turned)(const Weight&, int64_t row0, int64_t row1, const float* x, int64_t ldx, int tokens, float* y,
                       int64_t ldy);
  // The same with x rounded where that is faster; a row of x gets the same bits, whatever other rows are in the call.
  void (*turned)(const Weight&, int64_t row0, int64_t row1, const float* x, int64_t ldx, int tokens, float* y,
                 int64_t ldy);
  void (*silu_multiply)(float* gate, const float* up, int64_t count, float scale);
  void (*rms_norm)(const float* x, const float* weight, int64_t count, float eps, float* y);
  void (*add_scaled)(float* y, const float* x, int64_t count, float factor);
  void (*blend)(float* y, const float* x, int64_t count, float of_y, float of_x);  // y = y * of_y + x * of_x
  void (*attend)(const AttendTask&);
  // Ranges of the keys of one page and KV head, `head` counted over all pages and heads; all there is if a key or a value
  // is not finite.
  void (*find_ranges)(const KvPool& pool, int64_t head, int64_t head_dim, uint16_t* ranges);
  // The greatest score that each row may have in each of `pages` pages, whose ranges these are: scores[row * pages + i].
  void (*bound_scores)(const BoundedRows&, const uint16_t* const* ranges, int64_t pages, float* scores);
  uint64_t (*checksum)(const char* bytes, int64_t count);  // count is a multiple of 1024
  int64_t (*dot_products)(int64_t rounds);  // of bytes in registers, as fast as they go: how many
};

const Kernels& kernels();  // the chosen instruction set
extern const int across_tokens;          // up to so many, a product takes rows one after the other; see gemv.inl
extern const int64_t prefetch_ahead[2];  // bytes that one token's product of 2 to 4 and of 8 bits asks ahead of itself

inline float bf16_to_float(uint16_t bits) {
  uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// Where channel d of a head's token lies in a page of kCacheInt8Blocks.
inline int64_t key_place(int64_t token, int64_t d, int64_t width) {
  return ((token / kBlockKeys * (width / 4) + d / 4) * kBlockKeys + token % kBlockKeys) * 4 + d % 4;
}
inline int64_t value_place(int64_t token, int64_t d, int64_t width) { return (token / 4 * width + d) * 4 + token % 4; }

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

}  // namespace coldstream

#define COLDSTREAM_API extern "C" __attribute__((visibility("default")))
