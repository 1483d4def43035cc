#include <algorithm>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <mutex>

#include "mlp.h"
#include "moe.h"

namespace coldstream {
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
  for (int64_t t = 0; block.router_bias && t < tokens; ++t)
    table.add_scaled(routing.logits + t * block.experts, block.router_bias, block.experts, 1.0f);
  for (int64_t t = 0; t < tokens; ++t)
    choose(block.selection, block.correction, routing.logits + t * block.experts, block.experts, block.top_k,
           routing.chosen + t * block.top_k, routing.weights + t * block.top_k);
}

namespace {

bool resident(const MoeBlock& block, const int32_t* chosen, int64_t count) {
  return std::all_of(chosen, chosen + count, [&](int32_t expert) { return state_of(block, expert) == kReady; });
}

Weight at(Weight weight, int64_t packed, int64_t scale, int64_t form) {
  weight.kind = int32_t(form & 0xffffffff);
  weight.group = int32_t(form >> 32);
  weight.packed = reinterpret_cast<const uint8_t*>(packed);
  weight.scale = reinterpret_cast<const uint16_t*>(scale);
  return weight;
}

Job routed_job(const MoeBlock& block, int32_t expert, const int32_t* tokens, int64_t count, const float* weights) {
  const ExpertEntry& e = block.table[expert];
  const bool scales_input = block.selection.scales_input();
  return {at(block.gate, e.gate, e.gate_scale, e.gate_form),
          at(block.up, e.up, e.up_scale, e.up_form),
          at(block.down, e.down, e.down_scale, e.down_form),
          tokens,
          count,
          scales_input ? weights : nullptr,
          scales_input ? nullptr : weights,
          nullptr,
          reinterpret_cast<const void*>(e.gate_bias),
          reinterpret_cast<const void*>(e.up_bias),
          reinterpret_cast<const void*>(e.down_bias),
          int32_t(e.bias_kind),
          block.alpha,
          block.limit,
          block.offset};
}

// The shared expert's job, if there is one; `weights` keeps the sigmoid of its own router.
void add_shared(const MoeBlock& block, int64_t tokens, const Routing& routing, std::vector<float>& weights,
                std::vector<Job>& jobs) {
  if (!block.shared) return;
  const float* weigh = nullptr;
  if (block.shared_router.k) {
    Scratch scratch;
    weights.resize(size_t(tokens));
    Product product{block.shared_router, routing.normed, block.router.k, tokens, weights.data(), 1, {}};
    multiply(&product, 1, true, scratch);
    for (float& value : weights) value = 1.0f / (1.0f + std::exp(-value));
    weigh = weights.data();
  }
  jobs.push_back({block.shared_gate, block.shared_up, block.shared_down, nullptr, tokens, nullptr, weigh, nullptr});
}

void start(const MoeBlock& block, const float* x, int64_t ldx, int64_t tokens, float* out, int64_t ldout) {
  for (int64_t t = 0; t < tokens; ++t) {
    if (block.norm) std::memmove(out + t * ldout, x + t * ldx, size_t(block.router.k) * 4);
    else std::memset(out + t * ldout, 0, size_t(block.router.k) * 4);
  }
}

std::mutex publish_mutex;
std::condition_variable published;

}  // namespace

void compute_block(const MoeBlock& block, const float* x, int64_t ldx, int64_t tokens, const Routing& routing,
                   float* out, int64_t ldout, bool exact) {
  std::vector<std::vector<int32_t>> owned_tokens(size_t(block.experts));
  std::vector<std::vector<float>> owned_weights(size_t(block.experts));
  for (int64_t i = 0; i < tokens * block.top_k; ++i) {
    owned_tokens[size_t(routing.chosen[i])].push_back(int32_t(i / block.top_k));
    owned_weights[size_t(routing.chosen[i])].push_back(routing.weights[i]);
  }
  std::vector<Job> jobs;
  std::vector<float> shared_weights;
  add_shared(block, tokens, routing, shared_weights, jobs);
  for (size_t e = 0; e < owned_tokens.size(); ++e)
    if (!owned_tokens[e].empty())
      jobs.push_back(routed_job(block, int32_t(e), owned_tokens[e].data(), int64_t(owned_tokens[e].size()),
                                owned_weights[e].data()));
  start(block, x, ldx, tokens, out, ldout);
  run_jobs(jobs.data(), int64_t(jobs.size()), routing.normed, block.router.k, out, ldout, exact);
}

void compute_shared(const MoeBlock& block, const float* x, int64_t tokens, const Routing& routing, float* out,
                    bool exact) {
  std::vector<Job> jobs;
  std::vector<float> weights;
  const int64_t hidden = block.router.k;
  add_shared(block, tokens, routing, weights, jobs);
  start(block, x, hidden, tokens, out, hidden);
  run_jobs(jobs.data(), int64_t(jobs.size()), routing.normed, hidden, out, hidden, exact);
}

void compute_routed(const MoeBlock& block, int64_t tokens, const Routing& routing, const std::vector<int32_t>& experts,
                    float* parts, bool exact) {
  const int64_t hidden = block.router.k, places = tokens * block.top_k;
  std::vector<std::vector<int32_t>> owned_tokens(experts.size()), owned_places(experts.size());
  std::vector<std::vector<float>> owned_weights(experts.size());
  std::vector<Job> jobs;
  for (size_t e = 0; e < experts.size(); ++e) {
    for (int64_t i = 0; i < places; ++i) {
      if (routing.chosen[i] != experts[e]) continue;
      owned_tokens[e].push_back(int32_t(i / block.top_k));
      owned_places[e].push_back(int32_t(i));
      owned_weights[e].push_back(routing.weights[i]);
      std::memset(parts + i * hidden, 0, size_t(hidden) * 4);
    }
    Job job = routed_job(block, experts[e], owned_tokens[e].data(), int64_t(owned_tokens[e].size()),
                         owned_weights[e].data());
    job.out_weight = nullptr;  // its part is weighed as it is added
    job.out_rows = owned_places[e].data();
    jobs.push_back(job);
  }
  run_jobs(jobs.data(), int64_t(jobs.size()), routing.normed, hidden, parts, hidden, exact);
}

void add_routed(const MoeBlock& block, int64_t tokens, const Routing& routing, const float* parts, float* out) {
  const int64_t hidden = block.router.k;
  const bool scales_input = block.selection.scales_input();
  std::vector<int64_t> order(static_cast<size_t>(block.top_k));
  for (int64_t t = 0; t < tokens; ++t) {
    for (int k = 0; k < block.top_k; ++k) order[size_t(k)] = t * block.top_k + k;
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return routing.chosen[a] < routing.chosen[b]; });
    for (int64_t place : order)
      kernels().add_scaled(out + t * hidden, parts + place * hidden, hidden,
                           scales_input ? 1.0f : routing.weights[place]);
  }
}

ExpertState state_of(const MoeBlock& block, int32_t expert) {
  return ExpertState(__atomic_load_n(&block.table[expert].state, __ATOMIC_ACQUIRE));
}

bool await_experts(const MoeBlock& block, const std::vector<int32_t>& experts, double seconds) {
  std::unique_lock<std::mutex> lock(publish_mutex);
  return published.wait_for(lock, std::chrono::duration<double>(seconds), [&] {
    return std::any_of(experts.begin(), experts.end(), [&](int32_t e) { return state_of(block, e) != kComing; });
  });
}

}  // namespace coldstream

// Set an expert's state from any thread, after everything else of its entry, and wake whoever waits for it.
COLDSTREAM_API void cs_publish(int64_t* state, int64_t value) {
  using namespace coldstream;
  {
    std::lock_guard<std::mutex> lock(publish_mutex);
    __atomic_store_n(state, value, __ATOMIC_RELEASE);
  }
  published.notify_all();
}

// Route, and if every chosen expert is resident compute the block too and set *complete; otherwise out is left
// alone and the caller fetches what is missing and runs the jobs itself.
COLDSTREAM_API int32_t cs_moe(const coldstream::MoeBlock* block, const float* x, int64_t ldx, int64_t tokens,
                              float* out, int64_t ldout, const coldstream::Routing* routing, int32_t exact,
                              int32_t* complete) {
  using namespace coldstream;
  return guarded([&] {
    route(*block, x, ldx, tokens, *routing);
    *complete = out && resident(*block, routing->chosen, tokens * block->top_k);
    if (*complete) compute_block(*block, x, ldx, tokens, *routing, out, ldout, exact != 0);
  });
}
