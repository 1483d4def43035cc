// Runs every native kernel on heap blocks of exactly the right size, on every instruction set, against naive
// arithmetic: built with a sanitizer, a single byte too far or one unordered access ends it.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "attention.h"
#include "bell.h"
#include "lookahead.h"
#include "mlp.h"
#include "moe.h"

using namespace coldstream;

extern "C" {
int32_t cs_set_threads(int32_t);
int32_t cs_set_isa(const char*);
const char* cs_isa_at(int32_t);
double cs_read_bandwidth(int64_t, double);
double cs_dot_rate(double);
int32_t cs_quantize(const QuantizeJob*, QuantizeStats*);
int32_t cs_linear(const Weight*, const float*, int64_t, int64_t, float*, int64_t, int32_t);
int32_t cs_mlp(const Job*, int64_t, const float*, int64_t, float*, int64_t, int32_t);
int32_t cs_moe(const MoeBlock*, const float*, int64_t, int64_t, float*, int64_t, const Routing*, int32_t, int32_t*);
void cs_publish(int64_t*, int64_t);
int32_t cs_guess(const Lookahead*, int32_t, int32_t, const float*, int32_t*, int32_t*);
void cs_learn(const Lookahead*, int32_t, const int32_t*);
int32_t cs_attention(const AttentionBlock*, const float*, int64_t, int64_t, int64_t, const float*, const float*,
                     const KvPool*, const int32_t*, float*, int64_t, int32_t);
int32_t cs_bell_serve(const Bell*, int64_t, int32_t*);
int32_t cs_bell_load(const int32_t*, int64_t);
void cs_bell_store(int32_t*, int64_t, int32_t);
}

namespace {

// Every buffer is a malloc of its own, so that the sanitizer guards both of its ends. Kept until the end of a run.
struct Heap {
  std::vector<std::unique_ptr<void, void (*)(void*)>> blocks;

  template <class T>
  T* take(int64_t count) {
    void* block = std::malloc(size_t(count) * sizeof(T));
    blocks.emplace_back(block, std::free);
    return static_cast<T*>(block);
  }
};

struct Random {
  std::mt19937 engine;

  explicit Random(unsigned seed) : engine(seed) {}
  float normal() { return std::normal_distribution<float>()(engine); }
  int64_t below(int64_t limit) { return int64_t(engine() % uint32_t(limit)); }
};

void require(bool fine, const char* what, int64_t a = 0, int64_t b = 0) {
  if (fine) return;
  std::printf("driver: %s failed (%lld, %lld)\n", what, (long long)a, (long long)b);
  std::exit(1);
}

float* normals(Heap& heap, Random& random, int64_t count, float factor = 1.0f) {
  float* values = heap.take<float>(count);
  for (int64_t i = 0; i < count; ++i) values[i] = random.normal() * factor;
  return values;
}

bool is_packed(int32_t kind) { return kind == kInt2 || kind == kInt3 || kind == kInt4 || kind == kInt8; }
int bits_of(int32_t kind) { return kind == kInt2 ? 2 : kind == kInt3 ? 3 : kind == kInt4 ? 4 : 8; }

double element(const Weight& w, int64_t row, int64_t column) {
  if (w.kind == kF32) return reinterpret_cast<const float*>(w.packed)[row * w.k + column];
  if (w.kind == kBf16) return bf16_to_float(reinterpret_cast<const uint16_t*>(w.packed)[row * w.k + column]);
  const double scale = bf16_to_float(w.scale[row * w.groups() + column / w.group]);
  const int bits = bits_of(w.kind);
  int value = 0;
  for (int i = 0; i < bits; ++i) {
    const int64_t at = (row * w.k + column) * bits + i;
    value |= (w.packed[at / 8] >> at % 8 & 1) << i;
  }
  return (value - (1 << (bits - 1))) * scale;
}

Weight random_weight(Heap& heap, Random& random, int32_t kind, int32_t group, int64_t n, int64_t k) {
  Weight w{kind, group, n, k, nullptr, nullptr};
  if (kind == kF32) {
    w.packed = reinterpret_cast<uint8_t*>(normals(heap, random, n * k, 0.2f));
    return w;
  }
  if (kind == kBf16) {
    uint16_t* rows = heap.take<uint16_t>(n * k);
    for (int64_t i = 0; i < n * k; ++i) rows[i] = uint16_t(0x3c00 + random.below(0x200) + (random.below(2) << 15));
    w.packed = reinterpret_cast<uint8_t*>(rows);
    return w;
  }
  QuantizeJob job{normals(heap, random, n * k, 0.2f), kSourceF32, kind, group, 0, n, k, k,
                  heap.take<uint32_t>(n * k * bits_of(kind) / 32), heap.take<uint16_t>(n * k / group)};
  QuantizeStats stats;
  require(cs_quantize(&job, &stats) == kOk && stats.nonfinite == 0, "quantize", n, k);
  w.packed = reinterpret_cast<uint8_t*>(job.packed);
  w.scale = job.scale;
  return w;
}

void check_transposed(Heap& heap, Random& random, int32_t kind, int32_t group, int64_t n, int64_t k) {
  const int64_t stride = n + 5, words = k * bits_of(kind) / 32;
  float* rows = normals(heap, random, n * k);
  float* columns = heap.take<float>((k - 1) * stride + n);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < k; ++j) columns[j * stride + i] = rows[i * k + j];
  QuantizeJob straight{rows, kSourceF32, kind, group, 0, n, k, k, heap.take<uint32_t>(n * words),
                       heap.take<uint16_t>(n * k / group)};
  QuantizeJob turned = straight;
  turned.source = columns;
  turned.transposed = 1;
  turned.stride = stride;
  turned.packed = heap.take<uint32_t>(n * words);
  turned.scale = heap.take<uint16_t>(n * k / group);
  QuantizeStats stats;
  require(cs_quantize(&straight, &stats) == kOk && cs_quantize(&turned, &stats) == kOk, "quantize", n, k);
  require(!std::memcmp(straight.packed, turned.packed, size_t(n * words) * 4), "transposed words", n, k);
  require(!std::memcmp(straight.scale, turned.scale, size_t(n * k / group) * 2), "transposed scales", n, k);
}

void check_linear(Heap& heap, Random& random, const Weight& w, int64_t tokens) {
  const float* x = normals(heap, random, tokens * w.k);
  float* y = heap.take<float>(tokens * w.n);
  for (int exact = 0; exact < 2; ++exact) {
    require(cs_linear(&w, x, w.k, tokens, y, w.n, exact) == kOk, "linear", w.n, w.k);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t row = 0; row < w.n; ++row) {
        double sum = 0, size = 1e-6;
        for (int64_t i = 0; i < w.k; ++i) {
          const double product = element(w, row, i) * x[t * w.k + i];
          sum += product;
          size += std::fabs(product);
        }
        const double allowed = exact || !w.is_packed() ? 2e-6 * size : 0.02 * size;
        require(std::fabs(y[t * w.n + row] - sum) <= allowed, "a product's value", tokens, row);
      }
  }
}

struct Mlp {
  Weight gate, up, down;
};

Mlp random_mlp(Heap& heap, Random& random, int32_t kind, int32_t group, int64_t hidden, int64_t inner) {
  return {random_weight(heap, random, kind, group, inner, hidden), random_weight(heap, random, kind, group, inner, hidden),
          random_weight(heap, random, kind, group, hidden, inner)};
}

Selection random_selection(Random& random) {
  const int32_t groups = random.below(2) ? 3 : 1;
  return {int32_t(random.below(5)), groups, groups > 1 ? 2 : 1, int32_t(1 + random.below(2)), 1.5f, 0.0f};
}

void run_lookahead(Heap& heap, Random& random) {
  const int64_t layers = 5, experts = 6, hidden = 96;
  const int32_t top_k = 2, depth = 3, bins = 3, slots = 2;
  const float edges[] = {0.1f, 0.5f};
  float* right = heap.take<float>(kGuessKinds * depth * bins);
  std::fill(right, right + kGuessKinds * depth * bins, 0.75f);
  int32_t* counts = heap.take<int32_t>(layers);
  std::fill(counts, counts + layers, 0);
  Lookahead lookahead{random_weight(heap, random, kF32, 0, layers * experts, hidden), int32_t(layers), int32_t(experts),
                      top_k, depth, bins, slots, 0.75f, 0.9f, edges, right,
                      heap.take<int32_t>(layers * slots * (2 + top_k)), counts,
                      random.below(2) ? normals(heap, random, layers * experts) : nullptr,
                      random.below(2) ? normals(heap, random, layers * experts) : nullptr, random_selection(random)};
  int32_t* pairs = heap.take<int32_t>(2 * depth * top_k);
  for (int token = 0; token < 3; ++token)
    for (int32_t here = -1; here < layers; ++here) {
      int32_t count = -1;
      require(cs_guess(&lookahead, here < 0 ? kFromEmbedding : kFromOutput, here, normals(heap, random, hidden), pairs,
                       &count) == kOk, "a guess", here);
      require(count >= 0 && count <= depth * top_k, "a number of guesses", count);
      for (int i = 0; i < count; ++i)
        require(pairs[2 * i] > here && pairs[2 * i] < layers && pairs[2 * i + 1] < experts, "a guess in range", here);
      const int32_t chosen[] = {int32_t(random.below(experts)), int32_t(random.below(experts))};
      if (here + 1 < layers) cs_learn(&lookahead, here + 1, chosen);
    }
}

void run_moe(Heap& heap, Random& random, int32_t kind, int32_t group, int64_t tokens) {
  const int64_t hidden = 3 * group, inner = 2 * group, experts = 6, top_k = 2;
  std::vector<ExpertEntry> table;
  MoeBlock block{};
  const bool biased = random.below(2);
  auto half = [&](int64_t count) {
    uint16_t* values = heap.take<uint16_t>(count);
    for (int64_t i = 0; i < count; ++i) values[i] = uint16_t(0x3c00 + random.below(0x200) + (random.below(2) << 15));
    return values;
  };
  for (int64_t e = 0; e < experts; ++e) {
    Mlp mlp = random_mlp(heap, random, kind, group, hidden, inner);
    auto at = [](const void* pointer) { return int64_t(reinterpret_cast<intptr_t>(pointer)); };
    const int64_t form = kind | int64_t(group) << 32;
    table.push_back({at(mlp.gate.packed), at(mlp.gate.scale), at(mlp.up.packed), at(mlp.up.scale), at(mlp.down.packed),
                     at(mlp.down.scale), biased ? at(half(inner)) : 0, biased ? at(half(inner)) : 0,
                     biased ? at(half(hidden)) : 0, form, form, form, kBf16, kReady});
    block.gate = mlp.gate;
    block.up = mlp.up;
    block.down = mlp.down;
  }
  const Mlp shared = random_mlp(heap, random, kind, group, hidden, inner);
  block.norm = normals(heap, random, hidden);
  block.eps = 1e-5f;
  block.selection = random_selection(random);
  block.correction = random.below(2) ? normals(heap, random, experts) : nullptr;
  block.experts = int32_t(experts);
  block.top_k = int32_t(top_k);
  block.router = random_weight(heap, random, kBf16, 0, experts, hidden);
  block.router_bias = biased ? normals(heap, random, experts) : nullptr;
  block.table = table.data();
  block.alpha = biased ? 1.702f : 1.0f;
  block.limit = biased ? 7.0f : std::numeric_limits<float>::infinity();
  block.offset = biased ? 1.0f : 0.0f;
  block.shared = 1;
  block.shared_gate = shared.gate;
  block.shared_up = shared.up;
  block.shared_down = shared.down;
  block.shared_router = random_weight(heap, random, kF32, 0, 1, hidden);
  Routing routing{heap.take<float>(tokens * hidden), heap.take<float>(tokens * experts),
                  heap.take<int32_t>(tokens * top_k), heap.take<float>(tokens * top_k)};
  const float* x = normals(heap, random, tokens * hidden);
  float* out = heap.take<float>(tokens * hidden);
  int32_t complete = 0;
  require(cs_moe(&block, x, hidden, tokens, out, hidden, &routing, 0, &complete) == kOk && complete, "MoE", tokens);
  for (int64_t i = 0; i < tokens * hidden; ++i) require(std::isfinite(out[i]), "a finite MoE output", tokens, i);
  ExpertEntry& entry = table[size_t(routing.chosen[0])];
  const ExpertEntry whole = entry;
  entry = {};
  require(cs_moe(&block, x, hidden, tokens, out, hidden, &routing, 0, &complete) == kOk && !complete, "a miss", tokens);
  // Another thread brings the expert while this one waits for it: what it wrote before must be seen.
  entry.state = kComing;
  std::thread reader([&] {
    std::memcpy(static_cast<void*>(&entry), &whole, offsetof(ExpertEntry, state));
    cs_publish(&entry.state, kReady);
  });
  while (!await_experts(block, {routing.chosen[0]}, 0.01)) {}
  reader.join();
  require(state_of(block, routing.chosen[0]) == kReady, "an expert that came", tokens);
  require(cs_moe(&block, x, hidden, tokens, out, hidden, &routing, 0, &complete) == kOk && complete, "MoE", tokens);
  std::set<int32_t> wanted(routing.chosen, routing.chosen + tokens * top_k);
  float* parts = heap.take<float>(tokens * top_k * hidden);
  float* sum = heap.take<float>(tokens * hidden);
  compute_shared(block, x, tokens, routing, sum, false);
  for (int32_t expert : wanted) compute_routed(block, tokens, routing, {expert}, parts, false);
  add_routed(block, tokens, routing, parts, sum);
  for (int64_t i = 0; i < tokens * hidden; ++i) require(sum[i] == out[i], "a block in parts", tokens, i);

  int32_t* chosen = heap.take<int32_t>(tokens);
  float* factor = normals(heap, random, tokens);
  for (int64_t t = 0; t < tokens; ++t) chosen[t] = int32_t(random.below(tokens));
  Job jobs[] = {{shared.gate, shared.up, shared.down, nullptr, tokens, nullptr, factor},
                {block.gate, block.up, block.down, chosen, tokens, factor, nullptr},
                {block.gate, block.up, block.down, chosen, 0, nullptr, nullptr}};
  for (int exact = 0; exact < 2; ++exact)
    require(cs_mlp(jobs, 3, x, hidden, out, hidden, exact) == kOk, "mlp", tokens);
}

// Requests from another thread, as a GPU's, answered by this one: whole experts equal the plain call, and parts of
// them are within their bytes.
void run_bell(Heap& heap, Random& random, int32_t kind, int32_t group) {
  const int64_t hidden = 2 * group, inner = 3 * group, experts = 3, tokens = 2, top_k = 2, pairs = tokens * top_k;
  std::vector<Mlp> mlps;
  std::vector<int64_t> addresses;
  BellLayer stored{};
  for (int64_t e = 0; e < experts; ++e) {  // one block of memory per expert: the tensors at the same offsets
    const Mlp mlp = random_mlp(heap, random, kind, group, hidden, inner);
    const Weight* weights[] = {&mlp.gate, &mlp.up, &mlp.down};
    int64_t size = 0;
    for (int i = 0; i < 3; ++i) {
      stored.offsets[2 * i] = size;
      size += weights[i]->row_bytes() * weights[i]->n;
      stored.offsets[2 * i + 1] = size;
      size += weights[i]->groups() * weights[i]->n * 2;
    }
    uint8_t* slot = heap.take<uint8_t>(size);
    Mlp placed = mlp;
    Weight* parts[] = {&placed.gate, &placed.up, &placed.down};
    for (int i = 0; i < 3; ++i) {
      std::memcpy(slot + stored.offsets[2 * i], parts[i]->packed, size_t(parts[i]->row_bytes() * parts[i]->n));
      std::memcpy(slot + stored.offsets[2 * i + 1], parts[i]->scale, size_t(parts[i]->groups() * parts[i]->n * 2));
      parts[i]->packed = slot + stored.offsets[2 * i];
      parts[i]->scale = reinterpret_cast<uint16_t*>(slot + stored.offsets[2 * i + 1]);
    }
    mlps.push_back(placed);
    addresses.push_back(int64_t(reinterpret_cast<intptr_t>(slot)));
    stored.gate = placed.gate;
    stored.up = placed.up;
    stored.down = placed.down;
  }
  int32_t *control = heap.take<int32_t>(128), *request = heap.take<int32_t>(4 + 2 * pairs);
  std::memset(control, 0, 128 * 4);
  int32_t* hint = heap.take<int32_t>(top_k);  // also of experts that there are not
  int64_t* warmed = heap.take<int64_t>(kKept + top_k);
  std::memset(hint, 0, top_k * 4);
  std::memset(warmed, 0, size_t(kKept + top_k) * 8);
  float *scores = normals(heap, random, pairs), *x = normals(heap, random, tokens * hidden);
  float *result = heap.take<float>(tokens * hidden), *expected = heap.take<float>(tokens * hidden);
  const Bell bell{control, request, scores, x, result, addresses.data(), 1, experts, pairs, &stored, 0, 0, 0,
                  hint, top_k, 1 << 20, group, warmed};
  std::thread step([&] {
    for (int32_t number = 1; number <= 6; ++number) {
      request[0] = 0, request[1] = int32_t(tokens), request[2] = int32_t(top_k), request[3] = 0;
      for (int64_t pair = 0; pair < pairs; ++pair) {
        request[4 + pair] = int32_t(random.below(experts));
        request[4 + pairs + pair] = number == 1 ? 0 : int32_t(random.below(4) * group);
      }
      for (int64_t i = 0; i < 40; ++i) {
        cs_bell_store(hint, i % top_k, int32_t(random.below(experts + 2)));
        if (i % 8 == 0) std::this_thread::yield();
      }
      cs_bell_store(control, kRung, number);
      while (cs_bell_load(control, kAnswered) != number) std::this_thread::yield();
      for (int64_t i = 0; i < tokens * hidden; ++i) require(std::isfinite(result[i]), "a finite answer", number, i);
      if (number > 1) continue;
      std::memset(expected, 0, size_t(tokens * hidden) * 4);
      for (int64_t pair = 0; pair < pairs; ++pair) {
        const Mlp& mlp = mlps[size_t(request[4 + pair])];
        const int32_t token = int32_t(pair / top_k);
        const Job job{mlp.gate, mlp.up, mlp.down, &token, 1, nullptr, scores + pair};
        require(cs_mlp(&job, 1, x, hidden, expected, hidden, 0) == kOk, "mlp", pair);
      }
      for (int64_t i = 0; i < tokens * hidden; ++i)
        require(std::fabs(result[i] - expected[i]) < 1e-4f * (1 + std::fabs(expected[i])), "an answer", i);
    }
    cs_bell_store(control, kStop, 1);
  });
  int32_t state = kIdle;
  while (state == kIdle) require(cs_bell_serve(&bell, 200, &state) == kOk, "bell", state);
  step.join();
  require(state == kStopped, "stopped", state);
}

void run_attention(Heap& heap, Random& random, int32_t storage, int64_t head_dim, int64_t tokens) {
  const int64_t heads = 6, kv_heads = 2, hidden = 96, blocks = (tokens + 2 + kPageTokens - 1) / kPageTokens;
  AttentionBlock block{};
  block.norm = normals(heap, random, hidden);
  block.eps = block.qk_eps = 1e-5f;
  block.heads = int32_t(heads);
  block.kv_heads = int32_t(kv_heads);
  block.head_dim = int32_t(head_dim);
  block.rope = int32_t(random.below(3));
  block.rope_dim = block.rope ? int32_t(head_dim / 2 * 2) : 0;
  block.qk_norm = int32_t(random.below(4));
  block.l2_norm = int32_t(random.below(2));
  block.q_norm = normals(heap, random, heads * head_dim);
  block.k_norm = normals(heap, random, kv_heads * head_dim);
  block.scaling = 1.0f / std::sqrt(float(head_dim));
  block.temperature_floor = 4.0f;
  block.temperature_scale = 0.1f;
  block.chunk = random.below(2) * 8;
  block.window = random.below(2) * 5;
  block.q = random_weight(heap, random, kInt4, 32, heads * head_dim, hidden);
  block.k = random_weight(heap, random, kInt8, 32, kv_heads * head_dim, hidden);
  block.v = random_weight(heap, random, kBf16, 0, kv_heads * head_dim, hidden);
  block.o = random_weight(heap, random, kF32, 0, hidden, heads * head_dim);
  block.v_bias = normals(heap, random, kv_heads * head_dim);
  const int64_t rows = blocks * kv_heads * kPageTokens;
  const int64_t bytes = rows * head_dim * (storage == kCacheF32 ? 4 : storage == kCacheBf16 ? 2 : 1);
  KvPool pool{heap.take<uint8_t>(bytes), heap.take<uint8_t>(bytes), nullptr, nullptr, storage};
  if (storage == kCacheInt8) {
    pool.key_scale = heap.take<float>(rows);
    pool.value_scale = heap.take<float>(rows);
  }
  int32_t* pages = heap.take<int32_t>(blocks);
  for (int64_t i = 0; i < blocks; ++i) pages[i] = int32_t(blocks - 1 - i);
  const float* x = normals(heap, random, (tokens + 2) * hidden);
  const float* angles = normals(heap, random, (tokens + 2) * (head_dim / 2 + 1));
  float* out = heap.take<float>((tokens + 2) * hidden);
  auto step = [&](int64_t start, int64_t count) {
    return cs_attention(&block, x + start * hidden, hidden, count, start, angles, angles, &pool, pages,
                        out + start * hidden, hidden, 0);
  };
  require(step(0, tokens) == kOk && step(tokens, 1) == kOk && step(tokens + 1, 1) == kOk, "attention", tokens);
  for (int64_t i = 0; i < (tokens + 2) * hidden; ++i) require(std::isfinite(out[i]), "a finite attention output", i);
}

void run_compressed_attention(Heap& heap, Random& random, int32_t storage, int64_t tokens) {
  const int64_t heads = 5, hidden = 96, latent = 96, rotated = 24, nope = 20, value = 12, half = (latent + rotated) / 2;
  const int64_t rank = random.below(2) ? 64 : 0, blocks = (tokens + 1 + kPageTokens - 1) / kPageTokens;
  AttentionBlock block{};
  block.norm = normals(heap, random, hidden);
  block.eps = block.qk_eps = 1e-5f;
  block.heads = int32_t(heads);
  block.kv_heads = 1;
  block.head_dim = int32_t(half);
  block.rope = int32_t(1 + random.below(2));
  block.rope_dim = int32_t(rotated);
  block.scaling = 0.1f;
  block.latent = int32_t(latent);
  block.nope = int32_t(nope);
  block.value_dim = int32_t(value);
  if (rank) {
    block.q_down = random_weight(heap, random, kInt4, 32, rank, hidden);
    block.q_norm = normals(heap, random, rank);
  }
  block.k_norm = normals(heap, random, latent);
  block.q = random_weight(heap, random, kInt8, 32, heads * (nope + rotated), rank ? rank : hidden);
  block.k = random_weight(heap, random, kInt4, 32, latent + rotated, hidden);
  block.v = random_weight(heap, random, random.below(2) ? kInt8 : kBf16, 32, heads * (nope + value), latent);
  block.o = random_weight(heap, random, kF32, 0, hidden, heads * value);
  const int64_t rows = blocks * kPageTokens;
  const int64_t bytes = rows * half * (storage == kCacheF32 ? 4 : storage == kCacheBf16 ? 2 : 1);
  KvPool pool{heap.take<uint8_t>(bytes), heap.take<uint8_t>(bytes), nullptr, nullptr, storage};
  if (storage == kCacheInt8) {
    pool.key_scale = heap.take<float>(rows);
    pool.value_scale = heap.take<float>(rows);
  }
  int32_t* pages = heap.take<int32_t>(blocks);
  for (int64_t i = 0; i < blocks; ++i) pages[i] = int32_t(blocks - 1 - i);
  const float* x = normals(heap, random, (tokens + 1) * hidden);
  const float* angles = normals(heap, random, (tokens + 1) * rotated / 2);
  float* out = heap.take<float>((tokens + 1) * hidden);
  auto step = [&](int64_t start, int64_t count) {
    const int64_t angle = start * rotated / 2;
    return cs_attention(&block, x + start * hidden, hidden, count, start, angles + angle, angles + angle, &pool, pages,
                        out + start * hidden, hidden, 0);
  };
  require(step(0, tokens) == kOk && step(tokens, 1) == kOk, "compressed attention", tokens);
  for (int64_t i = 0; i < (tokens + 1) * hidden; ++i) require(std::isfinite(out[i]), "a finite output", i);
}

void run_all(unsigned seed, bool thorough) {
  Random random(seed);
  for (int32_t kind : {kInt2, kInt3, kInt4, kInt8, kBf16, kF32})
    for (int32_t group : {32, 64, 128, 256}) {
      Heap heap;
      const bool packed = is_packed(kind);
      if (packed) check_transposed(heap, random, kind, group, 1 + random.below(130), group * (1 + random.below(3)));
      for (int64_t tokens : {1, 2, 3, 4, 5, 17}) {
        const int64_t n = 1 + random.below(thorough ? 70 : 40);
        const int64_t k = packed ? group * (1 + random.below(3)) : 1 + random.below(group);
        check_linear(heap, random, random_weight(heap, random, kind, packed ? group : 0, n, k), tokens);
      }
      if (packed && group <= 64)
        for (int64_t tokens : {1, 6}) run_moe(heap, random, kind, group, tokens);
      if (packed) run_bell(heap, random, kind, group);
    }
  {
    Heap heap;
    run_lookahead(heap, random);
  }
  for (int32_t storage : {kCacheF32, kCacheBf16, kCacheInt8})
    for (int64_t head_dim : {8, 40, 128}) {
      Heap heap;
      run_attention(heap, random, storage, head_dim, 1);
      run_attention(heap, random, storage, head_dim, thorough ? 150 : 40);
      if (head_dim == 40) run_compressed_attention(heap, random, storage, thorough ? 140 : 20);
    }
}

}  // namespace

int main() {
  require(cs_set_threads(3) == kOk, "set_threads");
  require(cs_read_bandwidth(4 << 20, 0.01) > 0, "read_bandwidth");
  for (int i = 0; const char* isa = cs_isa_at(i); ++i) {
    require(cs_set_isa(isa) == kOk, "set_isa", i);
    require(cs_dot_rate(0.001) > 0, "dot_rate", i);
    run_all(unsigned(i), true);
  }
  require(cs_set_isa("") == kOk && cs_set_isa("none") == kBadArgument, "set_isa");
  std::thread other([] { run_all(50, false); });  // two callers at once take turns
  run_all(51, false);
  other.join();
  require(cs_set_threads(1) == kOk && cs_set_threads(2) == kOk, "set_threads");
  run_all(52, false);
  std::puts("driver: all kernels ran");
}
