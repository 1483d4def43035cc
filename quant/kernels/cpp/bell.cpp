// The host's side of a decode step that runs on a GPU: wait for a doorbell in memory that both see, compute the part
// of an expert that the GPU leaves to the CPU, answer.
//
// The GPU writes a request, then `rung` with release; the host reads `rung` with acquire, writes the result, then
// `answered` with release. One request is open at a time. Each word has one writer: a GPU's atomics on host memory are
// not atomic against the CPU, so neither side may modify the other's.
#include "bell.h"

#include <chrono>

namespace coldstream {

namespace {

int32_t load(const Bell& bell, int64_t word) { return __atomic_load_n(bell.control + word, __ATOMIC_ACQUIRE); }

const BellLayer& asked(const Bell& bell) { return bell.stored[bell.request[0]]; }

bool valid(const Bell& bell) {
  const int32_t *request = bell.request, tokens = request[1], k = request[2];
  if (request[0] < 0 || request[0] >= bell.layers || tokens < 1 || k < 1 || int64_t(tokens) * k > bell.pairs)
    return false;
  const BellLayer& stored = asked(bell);
  for (int64_t i = 0; i < int64_t(tokens) * k; ++i) {
    const int32_t expert = request[4 + i], first = request[4 + tokens * k + i];
    if (expert < 0 || expert >= bell.experts || first < 0 || first > stored.gate.n || first % stored.down.group)
      return false;
  }
  return true;
}

// One pair's share as a job: intermediate features [first, inter) of its expert.
Job job_of(const Bell& bell, int64_t pair, int64_t base, int32_t* token) {
  const BellLayer& stored = asked(bell);
  const int32_t pairs = bell.request[1] * bell.request[2];
  const int64_t first = bell.request[4 + pairs + pair];
  *token = int32_t(pair / bell.request[2]);
  const float* score = bell.scores + pair;
  const Part part = part_of(stored, base, first);
  return {part.gate,
          part.up,
          part.down,
          token,
          1,
          bell.scales_input ? score : nullptr,
          bell.scales_input ? nullptr : score};
}

// Adds the pairs of `expert` (-1: of all experts, by the table) to the result. False if one is not in the table.
bool add(const Bell& bell, int32_t expert, int64_t base) {
  const int64_t pairs = int64_t(bell.request[1]) * bell.request[2], hidden = asked(bell).gate.k;
  std::vector<Job> jobs;
  std::vector<int32_t> tokens(static_cast<size_t>(pairs));
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const int32_t chosen = bell.request[4 + pair];
    if (bell.request[4 + pairs + pair] >= asked(bell).gate.n || (expert >= 0 && chosen != expert)) continue;
    const int64_t at = expert >= 0 ? base : bell.addresses[bell.request[0] * bell.experts + chosen];
    if (!at) return false;
    jobs.push_back(job_of(bell, pair, at, &tokens[size_t(pair)]));
  }
  run_jobs(jobs.data(), int64_t(jobs.size()), bell.x, hidden, bell.result, hidden, bell.exact != 0);
  return true;
}

void clear(const Bell& bell) {
  std::memset(bell.result, 0, size_t(bell.request[1]) * size_t(asked(bell).gate.k) * sizeof(float));
}

}  // namespace
}  // namespace coldstream

// Serves requests for `microseconds`, or until one names an expert that the table lacks (the caller computes it), or
// the stop word is set.
COLDSTREAM_API int32_t cs_bell_serve(const coldstream::Bell* bell, int64_t microseconds, int32_t* state) {
  using namespace coldstream;
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::microseconds(microseconds);
  if (bell->keep_awake) keep_awake(std::chrono::microseconds(microseconds + bell->keep_awake));
  bool bad = false;
  const int32_t status = guarded([&] {
    for (*state = kIdle;;) {
      if (load(*bell, kStop)) {
        *state = kStopped;
        return;
      }
      const int32_t rung = load(*bell, kRung);
      if (rung == load(*bell, kAnswered)) {
        if (bell->prefetch_bytes && prefetch(*bell)) continue;
        for (int i = 0; i < 16; ++i) relax();
        if (std::chrono::steady_clock::now() >= deadline) return;
        continue;
      }
      if ((bad = !valid(*bell))) return;
      if (bell->prefetch_bytes) count_foreseen(*bell);
      clear(*bell);
      if (!add(*bell, -1, 0)) {
        *state = kMissing;
        return;
      }
      __atomic_store_n(bell->control + kAnswered, rung, __ATOMIC_RELEASE);
    }
  });
  return bad ? kBadArgument : status;
}

// The open request by hand: `begin` clears its result, `add` adds one expert whose bytes begin at `address`.
COLDSTREAM_API int32_t cs_bell_begin(const coldstream::Bell* bell) {
  if (!coldstream::valid(*bell)) return coldstream::kBadArgument;
  coldstream::clear(*bell);
  return coldstream::kOk;
}

COLDSTREAM_API int32_t cs_bell_add(const coldstream::Bell* bell, int32_t expert, int64_t address) {
  using namespace coldstream;
  if (!valid(*bell) || expert < 0 || !address) return kBadArgument;
  return guarded([&] { add(*bell, expert, address); });
}

COLDSTREAM_API int32_t cs_bell_load(const int32_t* control, int64_t word) {
  return __atomic_load_n(control + word, __ATOMIC_ACQUIRE);
}

COLDSTREAM_API void cs_bell_store(int32_t* control, int64_t word, int32_t value) {
  __atomic_store_n(control + word, value, __ATOMIC_RELEASE);
}
